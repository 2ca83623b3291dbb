//! Who uses a mount.

use crate::mountinfo::unescape;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::collections::{BTreeMap, HashMap};
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

/// An overlay in some process's `mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Overlay {
    /// Its device number, which all mounts of it have.
    device: String,
    point: PathBuf,
    lower: Vec<PathBuf>,
}

/// Those in a process's `mountinfo`, with their lower directories as they were named.
fn overlays(text: &str) -> impl Iterator<Item = Overlay> {
    text.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - overlay ")?;
        let options = back.split(' ').nth(1)?;
        let option = |name: &str| {
            let options = options.split(',');
            let named = options.filter_map(move |option| option.strip_prefix(name));
            named.collect::<Vec<_>>()
        };
        // One option for all of them, or one for each.
        let lower = [option("lowerdir="), option("lowerdir+=")].concat();
        let lower = lower.iter().flat_map(|all| all.split(':'));
        // Those after an empty one are of data only.
        let lower: Vec<_> = lower
            .filter(|name| !name.is_empty())
            .map(unescape)
            .collect();
        let mut front = front.split(' ').skip(2);
        Some(Overlay {
            device: front.next()?.to_owned(),
            point: unescape(front.nth(1)?),
            lower: match option("upperdir=").first() {
                Some(upper) => resolved(lower, &unescape(upper)),
                None => lower,
            },
        })
    })
}

/// Gives relative lower directories their full names, if the upper one tells where they
/// begin: containerd shortens what would be too long to what differs, and keeps all
/// directories of a snapshotter beneath one.
fn resolved(lower: Vec<PathBuf>, upper: &Path) -> Vec<PathBuf> {
    let base = upper.ancestors().skip(1).find(|base| {
        let mut relative = lower.iter().filter(|lower| lower.is_relative());
        base.is_absolute() && relative.all(|lower| is_there(&base.join(lower)))
    });
    match base {
        Some(base) => lower.iter().map(|lower| base.join(lower)).collect(),
        None => lower,
    }
}

/// Whether something has this name. Whoever serves it is asked for nothing.
fn is_there(path: &Path) -> bool {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    statx(CWD, path, flags, StatxFlags::empty()).is_ok()
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

/// Overlays: containers, for the most part. Nothing else tells who uses a layer: an overlay
/// has mounts of its own of what lies below it, which are in no list and keep no mount point
/// busy.
#[derive(Debug)]
pub struct Containers(Vec<Container>);

#[derive(Debug)]
struct Container {
    overlay: Overlay,
    /// In whose mount namespace its mount point is, unless it is in ours.
    of: Option<(u32, String)>,
    /// The processes on it.
    users: BTreeMap<u32, String>,
}

impl Containers {
    /// Those that there are now, in all mount namespaces that a process is in.
    pub fn look() -> Self {
        let read = |pid: &str| {
            let text = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            overlays(&String::from_utf8_lossy(&text)).collect::<Vec<_>>()
        };
        // A process sees what is beneath its root.
        let view = |pid: &str| {
            (
                namespace(pid),
                fs::read_link(format!("/proc/{pid}/root")).ok(),
            )
        };
        let mut found: BTreeMap<String, Container> = BTreeMap::new();
        let mut views = HashMap::new();
        let own = ("self".to_owned(), std::process::id());
        for (pid, id) in std::iter::once(own).chain(processes()) {
            let is_own = pid == "self";
            let overlays: &mut Vec<Overlay> = views.entry(view(&pid)).or_insert_with(|| read(&pid));
            if overlays.is_empty() {
                continue;
            }
            let (places, command) = (links(&pid).collect::<Vec<_>>(), command(&pid));
            for overlay in overlays {
                let container = found.entry(overlay.device.clone());
                let container = container.or_insert_with(|| Container {
                    overlay: overlay.clone(),
                    of: (!is_own).then(|| (id, command.clone())),
                    users: BTreeMap::new(),
                });
                // A namespace may have a copy of the host's mounts, as a service's has: only
                // those are used on which the process is.
                let on_it = |place: &PathBuf| place.starts_with(&overlay.point);
                if !is_own && places.iter().any(on_it) {
                    container.users.insert(id, command.clone());
                }
            }
        }
        Self(found.into_values().collect())
    }

    /// Those with the layer that is mounted at `point`, for people: the processes on them, and
    /// where those are mounted on which there is none. Empty if no overlay has the layer. What
    /// a lower directory's name is relative to nobody may know: it counts if it may be the
    /// layer's.
    pub fn of_layer(&self, point: &Path) -> String {
        told_all(self.0.iter().filter(|it| it.overlay.has_lower(point)))
    }

    /// Those on what is mounted at `directory`, an image with these layers, and those with
    /// that or one of its layers below them, for people. What is mounted at one of `images`
    /// is no other's; other daemons' images name their layers, which may be the same, without
    /// saying where they are. Empty if there are none.
    pub fn of_image(&self, directory: &Path, layers: &[PathBuf], images: &[PathBuf]) -> String {
        let uses = |it: &&Container| {
            let overlay = &it.overlay;
            let mut layers = layers.iter();
            match it.of.is_none() && images.contains(&overlay.point) {
                true => overlay.point == directory && !it.users.is_empty(),
                false => {
                    overlay.has_lower(directory) || layers.any(|it| overlay.lower.contains(it))
                }
            }
        };
        told_all(self.0.iter().filter(uses))
    }
}

/// The processes on them, and where those are mounted on which there is none.
fn told_all<'a>(containers: impl Iterator<Item = &'a Container>) -> String {
    let (mut users, mut unused) = (BTreeMap::new(), Vec::new());
    for container in containers {
        if container.users.is_empty() {
            unused.push(container.named());
        } else {
            users.extend(container.users.clone());
        }
    }
    unused.sort_unstable();
    if !users.is_empty() {
        unused.insert(0, told(&users));
    }
    unused.join(", ")
}

impl Container {
    /// By where it is mounted, for people.
    fn named(&self) -> String {
        let point = self.overlay.point.display();
        match &self.of {
            None => format!("the overlay mounted at {point}"),
            Some((pid, command)) => format!(
                "the overlay mounted at {point} in the mount namespace of {command} (process {pid})"
            ),
        }
    }
}

impl Overlay {
    /// Whether what is at `point` may be below it.
    fn has_lower(&self, point: &Path) -> bool {
        let mut relative = self.lower.iter().filter(|lower| lower.is_relative());
        self.lower.iter().any(|lower| {
            if lower.is_absolute() {
                return lower == point;
            }
            // All of them begin at the same place.
            let base = point.ancestors().nth(lower.components().count());
            point.ends_with(lower)
                && base.is_some_and(|base| relative.all(|lower| is_there(&base.join(lower))))
        })
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

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn overlays_tell_what_is_below() {
        let text = "36 35 98:0 /r /mnt/a rw - ext3 /dev/root rw,lowerdir=/no\n\
                    37 35 0:50 / /c\\0401/rootfs rw shared:9 - overlay overlay rw,lowerdir=/r/layers/a:b::d,upperdir=/u\n\
                    38 35 0:51 / / ro - overlay none ro,lowerdir+=/x,lowerdir+=/y\n\
                    39 35 0:52 / /broken ro - overlay\n";
        let found: Vec<_> = overlays(text).collect();
        let overlay = |device: &str, point: &str, lower| Overlay {
            device: device.into(),
            point: point.into(),
            lower: paths(lower),
        };
        assert_eq!(
            found,
            [
                overlay("0:50", "/c 1/rootfs", &["/r/layers/a", "b", "d"]),
                overlay("0:51", "/", &["/x", "/y"]),
            ]
        );
    }

    #[test]
    fn relative_names_begin_where_all_of_them_are() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["one/1/fs", "one/2/fs", "one/3/fs", "two/1/fs", "two/2/fs"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        let lower = || paths(&["1/fs", "3/fs", "/other"]);
        // Beneath the same directory as the upper one, or nobody knows where.
        assert_eq!(
            resolved(lower(), &at("one/9/fs")),
            [at("one/1/fs"), at("one/3/fs"), "/other".into()]
        );
        assert_eq!(resolved(lower(), &at("two/9/fs")), lower());
        let overlay = Overlay {
            device: "0:50".into(),
            point: "/".into(),
            lower: lower(),
        };
        let has = |name: &str| overlay.has_lower(&at(name));
        assert_eq!(["one/1/fs", "one/3/fs"].map(has), [true; 2]);
        assert_eq!(["one/2/fs", "two/1/fs", "1/fs", "fs"].map(has), [false; 4]);
        assert!(overlay.has_lower(Path::new("/other")));
    }

    #[test]
    fn containers_are_named_by_what_is_below_them() {
        let container = |number: u32, lower: &[&str], users: &[u32], of: Option<u32>| Container {
            overlay: Overlay {
                device: format!("0:{number}"),
                point: format!("/c/{number}").into(),
                lower: paths(lower),
            },
            of: of.map(|pid| (pid, "runc".to_owned())),
            users: users.iter().map(|pid| (*pid, "sh".to_owned())).collect(),
        };
        let containers = Containers(vec![
            container(1, &["/r/layers/a", "/r/layers/b"], &[1, 2], None),
            container(2, &["/r/layers/b"], &[2, 3], Some(2)),
            container(3, &["/other/layers/b", "/yers/b"], &[4], None),
            container(4, &["/r/layers/b", "/r/layers/d"], &[], None),
            container(5, &["/r/layers/d"], &[], Some(7)),
        ]);
        let of = |point| containers.of_layer(Path::new(point));
        assert_eq!(of("/r/layers/a"), "sh (process 1), sh (process 2)");
        assert_eq!(
            of("/r/layers/b"),
            "sh (process 1), sh (process 2), sh (process 3), the overlay mounted at /c/4"
        );
        assert_eq!(of("/r/layers/c"), "");
        assert_eq!(
            of("/r/layers/d"),
            "the overlay mounted at /c/4, \
             the overlay mounted at /c/5 in the mount namespace of runc (process 7)"
        );
    }

    #[test]
    fn images_are_used_by_who_is_on_them_and_by_others_with_their_layers() {
        let container = |point: &str, lower: &[&str], users: &[u32]| Container {
            overlay: Overlay {
                device: String::new(),
                point: point.into(),
                lower: paths(lower),
            },
            of: None,
            users: users.iter().map(|pid| (*pid, "sh".to_owned())).collect(),
        };
        let containers = Containers(vec![
            container("/one", &["/r/a"], &[]),
            container("/two", &["/r/b", "/r/a"], &[1]),
            container("/three", &["/r/c"], &[]),
            container("/on/three", &["/three"], &[]),
            container("/four", &["/r/d"], &[]),
            container("/with/d", &["/r/d"], &[2]),
        ]);
        let images = paths(&["/one", "/two", "/three", "/four"]);
        let of = |directory: &str, layers: &[&str]| {
            containers.of_image(Path::new(directory), &paths(layers), &images)
        };
        assert_eq!(of("/one", &["/r/a"]), "");
        assert_eq!(of("/two", &["/r/a", "/r/b"]), "sh (process 1)");
        assert_eq!(of("/three", &["/r/c"]), "the overlay mounted at /on/three");
        assert_eq!(of("/four", &["/r/d"]), "sh (process 2)");
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
