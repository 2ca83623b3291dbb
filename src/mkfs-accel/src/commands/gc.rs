//! `mkfs-accel gc`: unfinished files that nobody works on any more.
//!
//! A temporary's name says which process made it. On the same boot of the same
//! host the process is looked for; of others nothing can be known, so that their
//! files go by age.

use crate::output::{Bytes, say};
use accel_ufs::UfsError;
use accel_ufs::publish::{Owner, Temporary, Ufs};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Remove other hosts' unfinished files that were not written to for so many
    /// days
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    older_than: u32,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    let here = Owner::this_process()?;
    let now = SystemTime::now();
    let old = Duration::from_hours(24) * arguments.older_than;
    let (mut count, mut bytes) = (0, 0);
    for temporary in ufs.temporaries()? {
        let verdict = judge(&temporary, &here, now, old, is_alive);
        let path = temporary.path.display();
        match verdict {
            Judgement::Keep(why) => say!("kept {path}: {why}")?,
            Judgement::Remove(why) => {
                if !arguments.dry_run {
                    remove(&temporary.path)?;
                }
                count += 1;
                bytes += temporary.size;
                let done = match arguments.dry_run {
                    true => "would remove",
                    false => "removed",
                };
                say!("{done} {path} ({}): {why}", Bytes(temporary.size))?;
            }
        }
    }
    let done = match arguments.dry_run {
        true => "to remove",
        false => "removed",
    };
    say!("{count} unfinished files {done}, {}", Bytes(bytes))?;
    Ok(())
}

/// What is to become of a file, and why.
#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    Keep(&'static str),
    Remove(&'static str),
}

fn judge(
    temporary: &Temporary,
    here: &Owner,
    now: SystemTime,
    old: Duration,
    is_alive: impl Fn(u32) -> bool,
) -> Judgement {
    if let Some(owner) = &temporary.owner
        && (&owner.host, &owner.boot_id) == (&here.host, &here.boot_id)
    {
        return match is_alive(owner.pid) {
            true => Judgement::Keep("the process that makes it is running"),
            false => Judgement::Remove("the process that made it is gone"),
        };
    }
    let age = temporary.modified.and_then(|m| now.duration_since(m).ok());
    match (age.is_some_and(|age| age >= old), &temporary.owner) {
        (true, Some(_)) => Judgement::Remove("another host's, not written to for long"),
        (true, None) => Judgement::Remove("nobody's that we know, not written to for long"),
        (false, Some(_)) => Judgement::Keep("another host's, which may be at work"),
        (false, None) => Judgement::Keep("nobody's that we know, but young"),
    }
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

fn remove(path: &Path) -> Result<(), UfsError> {
    match fs::remove_file(path) {
        // Its maker was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(UfsError::io("remove", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_go_by_their_process_here_and_by_age_elsewhere() {
        let here = Owner {
            host: "h".into(),
            boot_id: "b".into(),
            pid: 1,
        };
        let now = SystemTime::now();
        let day = Duration::from_hours(24);
        let removed = |host: Option<&str>, boot_id: &str, pid, age| {
            let temporary = Temporary {
                path: PathBuf::new(),
                owner: host.map(|host| Owner {
                    host: host.into(),
                    boot_id: boot_id.into(),
                    pid,
                }),
                size: 0,
                modified: Some(now - age),
            };
            let judgement = judge(&temporary, &here, now, 7 * day, |pid| pid == 42);
            matches!(judgement, Judgement::Remove(_))
        };
        assert!(!removed(Some("h"), "b", 42, 100 * day));
        assert!(removed(Some("h"), "b", 43, Duration::ZERO));
        // Two machines may have the same name: another boot is another host.
        assert!(!removed(Some("h"), "c", 43, 6 * day));
        assert!(removed(Some("h"), "c", 42, 7 * day));
        assert!(!removed(Some("g"), "b", 43, 6 * day));
        assert!(!removed(None, "", 0, 6 * day));
        assert!(removed(None, "", 0, 8 * day));
    }
}
