//! Who uses a mount.

use crate::mountinfo::unescape;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Processes that are named; the others are counted.
const NAMED: usize = 8;

/// A line of some process's `mountinfo`, as far as it is looked at.
fn mounts(text: &str) -> impl Iterator<Item = (&str, PathBuf)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let device = fields.next()?;
        Some((device, unescape(fields.nth(1)?)))
    })
}

/// The overlays in some process's `mountinfo`: where each is, and its lower directories, as
/// they were named.
fn overlays(text: &str) -> impl Iterator<Item = (PathBuf, Vec<PathBuf>)> {
    text.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - overlay ")?;
        let options = back.split(' ').nth(1)?.split(',');
        // One option for all of them, or one for each.
        let lower = options.filter_map(|option| {
            let all = option.strip_prefix("lowerdir=");
            all.or_else(|| option.strip_prefix("lowerdir+="))
        });
        let lower = lower.flat_map(|all| all.split(':')).map(unescape);
        let point = unescape(front.split(' ').nth(4)?);
        Some((point, lower.collect()))
    })
}

/// Whose mount namespace it is.
fn namespace(pid: &str) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/ns/mnt")).ok()?.ino())
}

/// The processes that keep the mount at `point` busy, for people: those that have a
/// file, their program or a directory there, and those in whose mount namespace
/// (a container's) it is as well. Empty if none is found.
pub fn of_mount(point: &Path) -> String {
    let Ok(own) = fs::read("/proc/self/mountinfo") else {
        return String::new();
    };
    let own = String::from_utf8_lossy(&own);
    let device = mounts(&own).filter(|(_, at)| at == point).last();
    let Some((device, _)) = device else {
        return String::new();
    };
    let here = namespace("self");
    named(|pid| {
        if namespace(pid) == here {
            return is_in(pid, point);
        }
        let text = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        mounts(&text).any(|(other, _)| other == device)
    })
}

/// Processes on overlays: containers, for the most part. Nothing else tells who uses a layer:
/// an overlay has mounts of its own of what lies below it, which are in no list and keep no
/// mount point busy.
#[derive(Debug)]
pub struct Containers(Vec<Container>);

#[derive(Debug)]
struct Container {
    pid: u32,
    command: String,
    /// Lower directories of the overlays that it is on. They may be relative.
    lower: Vec<PathBuf>,
}

impl Containers {
    /// Those that there are now.
    pub fn look() -> Self {
        let here = namespace("self");
        let read = |pid: &str| {
            let text = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            overlays(&String::from_utf8_lossy(&text)).collect::<Vec<_>>()
        };
        let own = read("self");
        let mut containers = Vec::new();
        for (pid, id) in processes() {
            let other = (namespace(&pid) != here).then(|| read(&pid));
            let overlays = other.as_ref().unwrap_or(&own);
            if overlays.is_empty() {
                continue;
            }
            // A namespace may have a copy of the host's mounts, as a service's has: only
            // those count on which the process is.
            let places: Vec<_> = links(&pid).collect();
            let mut lower = Vec::new();
            for (point, directories) in overlays {
                if places.iter().any(|place| place.starts_with(point)) {
                    lower.extend(directories.iter().cloned());
                }
            }
            if !lower.is_empty() {
                containers.push(Container {
                    pid: id,
                    command: command(&pid),
                    lower,
                });
            }
        }
        Self(containers)
    }

    /// Those on overlays with the layer that is mounted at `point`, for people. Empty if
    /// there are none.
    pub fn of_layer(&self, point: &Path) -> String {
        let uses = |container: &&Container| {
            let lower = &mut container.lower.iter();
            // containerd shortens what would be too long to paths that begin somewhere.
            lower.any(|lower| !lower.as_os_str().is_empty() && point.ends_with(lower))
        };
        let users = self.0.iter().filter(uses);
        told(&users.map(|user| (user.pid, user.command.clone())).collect())
    }
}

/// The processes that have the file `path` open, for people.
pub fn of_file(path: &Path) -> String {
    named(|pid| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut files = files.into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|to| to == path))
    })
}

/// The processes but for this one.
fn processes() -> impl Iterator<Item = (String, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let pid = name.parse::<u32>().ok()?;
        (pid != std::process::id()).then_some((name, pid))
    })
}

fn command(pid: &str) -> String {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    command.trim().to_owned()
}

/// The processes but for this one for which `uses` holds.
fn named(uses: impl Fn(&str) -> bool) -> String {
    let users = processes().filter(|(pid, _)| uses(pid));
    told(&users.map(|(pid, id)| (id, command(&pid))).collect())
}

fn told(users: &BTreeMap<u32, String>) -> String {
    let more = users.len().saturating_sub(NAMED);
    let named = users.iter().take(NAMED);
    let named: Vec<_> = named
        .map(|(pid, command)| format!("{command} (process {pid})"))
        .collect();
    match more {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// Whether a process of our mount namespace has something open at `point`.
fn is_in(pid: &str, point: &Path) -> bool {
    if links(pid).any(|place| place.starts_with(point)) {
        return true;
    }
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    maps.lines().any(|line| {
        let at = line.find('/').map(|at| Path::new(&line[at..]));
        at.is_some_and(|path| path.starts_with(point))
    })
}

/// Where a process is and which files it has open, by the names of its mount namespace.
/// What it has mapped is left out: who reads that may have to wait for a process that waits
/// for a page.
fn links(pid: &str) -> impl Iterator<Item = PathBuf> {
    let process = Path::new("/proc").join(pid);
    let files = fs::read_dir(process.join("fd")).into_iter().flatten();
    let files = files.flatten().map(|file| file.path());
    let own = ["root", "cwd", "exe"].map(|link| process.join(link));
    let links = own.into_iter().chain(files);
    links.filter_map(|link| fs::read_link(link).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_device_and_its_point() {
        let text = "36 35 98:0 /r /mnt/a\\040b rw,noatime - ext3 /dev/root rw\n";
        let found: Vec<_> = mounts(text).collect();
        assert_eq!(found, [("98:0", PathBuf::from("/mnt/a b"))]);
    }

    #[test]
    fn overlays_tell_what_is_below() {
        let text = "36 35 98:0 /r /mnt/a rw - ext3 /dev/root rw,lowerdir=/no\n\
                    37 35 0:50 / /c\\0401/rootfs rw shared:9 - overlay overlay rw,lowerdir=/r/layers/a:b,upperdir=/u\n\
                    38 35 0:51 / / ro - overlay none ro,lowerdir+=/x,lowerdir+=/y\n\
                    39 35 0:52 / /broken ro - overlay\n";
        let found: Vec<_> = overlays(text).collect();
        let paths = |names: [&str; 2]| names.map(PathBuf::from).to_vec();
        assert_eq!(
            found,
            [
                ("/c 1/rootfs".into(), paths(["/r/layers/a", "b"])),
                ("/".into(), paths(["/x", "/y"])),
            ]
        );
    }

    #[test]
    fn containers_are_named_by_what_is_below_them() {
        let container = |pid, lower: &[&str]| Container {
            pid,
            command: "sh".into(),
            lower: lower.iter().map(PathBuf::from).collect(),
        };
        let containers = Containers(vec![
            container(1, &["/r/layers/a", "/r/layers/b"]),
            container(2, &["", "layers/b"]),
            container(3, &["/other/layers/b", "yers/b"]),
        ]);
        let of = |point| containers.of_layer(Path::new(point));
        assert_eq!(of("/r/layers/a"), "sh (process 1)");
        assert_eq!(of("/r/layers/b"), "sh (process 1), sh (process 2)");
        assert_eq!(of("/r/layers/c"), "");
    }

    #[test]
    fn who_is_in_a_mount_is_named() {
        // This process is not among them; a child with its directory in /proc is.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir("/proc")
            .spawn()
            .unwrap();
        let users = of_mount(Path::new("/proc"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!users.is_empty());
        assert_eq!(of_mount(Path::new("/proc/self")), "");
    }
}
