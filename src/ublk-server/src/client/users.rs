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

/// The processes that have the file `path` open, for people.
pub fn of_file(path: &Path) -> String {
    named(|pid| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut files = files.into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|to| to == path))
    })
}

/// The processes but for this one for which `uses` holds.
fn named(uses: impl Fn(&str) -> bool) -> String {
    let mut users = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else {
            continue;
        };
        if uses(&pid.to_string()) {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            users.insert(pid, command.trim().to_owned());
        }
    }
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
    let process = Path::new("/proc").join(pid);
    let links = ["root", "cwd", "exe"].map(|link| process.join(link));
    let files = fs::read_dir(process.join("fd")).into_iter().flatten();
    let files = files.flatten().map(|file| file.path());
    let mut links = links.into_iter().chain(files);
    let beneath = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(point));
    if links.any(beneath) {
        return true;
    }
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    maps.lines().any(|line| {
        let at = line.find('/').map(|at| Path::new(&line[at..]));
        at.is_some_and(|path| path.starts_with(point))
    })
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
