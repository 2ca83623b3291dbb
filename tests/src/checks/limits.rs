//! Where there is too little memory, or too few descriptors or devices, what runs goes on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit};
use tempfile::TempDir;

use super::lifecycle::compare;
use crate::Setting;
use crate::daemon::Daemon;
use crate::fixture::image;
use crate::leftovers::State;

/// The daemon may open no file more, or a few: what it cannot attach then is refused with the
/// reason, nothing of it stays, and who reads what is mounted notices nothing.
pub fn attach_without_descriptors_is_refused(setting: &Setting) -> Result<()> {
    let (image, other) = (image(setting, "tiny")?, image(setting, "foreign")?);
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let (wanted, during) = (image.tree()?, State::now(setting)?);
    let pid = Pid::from_raw(i32::try_from(daemon.pid())?);
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.count() as u64;
    // The daemon has raised its limit to that.
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let allow =
        |current| rustix::process::prlimit(pid, Resource::Nofile, Rlimit { current, maximum });
    let checked = (0..4).try_for_each(|more| -> Result<()> {
        allow(Some(open + more))?;
        let refused = daemon.client(["attach", &other.source])?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success(), "{more} more are enough");
        ensure!(
            said.contains("no file descriptors left") || said.contains("Too many open files"),
            "with {more} more: {said}"
        );
        compare(&wanted, mounted.path(), "an attach that was refused")?;
        during.check_same_now(setting)
    });
    allow(maximum)?;
    checked.with_context(|| daemon.log())?;
    ensure!(daemon.attach(&other.source)?.len() > 1);
    daemon.detach(&other.source)?;
    mounted.unmount()?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// The driver's limit of devices is for unprivileged users, and none of ours; where it counts
/// all devices, a further one is refused with its name, and nothing of it stays.
pub fn limit_of_devices_is_no_limit_or_named(setting: &Setting) -> Result<()> {
    let parameter = Path::new("/sys/module/ublk_drv/parameters/ublks_max");
    let (image, other) = (image(setting, "tiny")?, image(setting, "foreign")?);
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let during = State::now(setting)?;
    let limit = std::fs::read_to_string(parameter)?;
    std::fs::write(parameter, "1")?;
    let checked = (|| -> Result<()> {
        let attached = daemon.client(["attach", &other.source])?;
        if attached.status.success() {
            return daemon.detach(&other.source);
        }
        let said = String::from_utf8_lossy(&attached.stderr).into_owned();
        ensure!(said.contains("ublks_max"), "{said}");
        during.check_same_now(setting)
    })();
    std::fs::write(parameter, limit.trim())?;
    checked.with_context(|| daemon.log())?;
    compare(&image.tree()?, mounted.path(), "a limit of devices")?;
    mounted.unmount()?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// Where nothing of its log can be written, a daemon serves as always, and so does who takes its
/// place.
pub fn full_disk_of_the_log_harms_nothing(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let (directory, program) = instead(
        setting,
        "if [ \"$1\" = serve ]; then exec >/dev/full 2>&1; fi",
    )?;
    let daemon = Daemon::start_program(setting, &program, &setting.ufs())?;
    let wanted = image.tree()?;
    let mounted = daemon.mount(&image.source)?;
    compare(&wanted, mounted.path(), "a log that cannot be written")?;
    daemon.kill_and_restart()?;
    compare(&wanted, mounted.path(), "a successor of that one")?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()?;
    drop(directory);
    before.check_same_now(setting)
}

/// Whether a command said so, whatever is in the daemon's log.
fn says(error: &anyhow::Error, what: &str) -> bool {
    let text = error.to_string();
    let said = text.split("--- the daemon's log ---").next();
    said.is_some_and(|said| said.contains(what))
}

/// A program that does `first`, words of a shell, and then is `ublk-server`; it lies in the
/// directory.
fn instead(setting: &Setting, first: &str) -> Result<(TempDir, PathBuf)> {
    let directory = setting.scratch_dir()?;
    let program = directory.path().join("instead");
    let server = setting.ublk_server();
    let text = format!(
        "#!/bin/sh\nset -e\n{first}\nexec {} \"$@\"\n",
        server.display()
    );
    std::fs::write(&program, text)?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, executable)?;
    Ok((directory, program))
}

/// Daemon and workers share little memory with a program that takes all there is: that
/// one is ended, again and again, and reads go on.
pub fn reads_go_on_when_memory_is_short(setting: &Setting) -> Result<()> {
    /// Ends of that program.
    const ENDS: usize = 16;
    /// Of another image meanwhile.
    const MOUNTS: usize = 4;
    /// Only a bound for mounts of which none succeeds.
    const LONGEST: Duration = Duration::from_secs(600);
    let (image, other) = (image(setting, "tiny")?, image(setting, "foreign")?);
    let before = State::now(setting)?;
    let root = Path::new("/sys/fs/cgroup");
    std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
    let group = root.join(format!("accel-memory-{}", std::process::id()));
    std::fs::create_dir(&group)?;
    let enter = format!("echo $$ >{}/cgroup.procs", group.display());
    // Scored as by deploy/systemd/ublk-server.service.
    let scored = "echo -1000 >/proc/self/oom_score_adj";
    let (script, program) = instead(
        setting,
        &format!("if [ \"$1\" = serve ]; then {enter}; {scored}; fi"),
    )?;
    let checked = (|| -> Result<()> {
        std::fs::write(group.join("memory.max"), "128M")?;
        let daemon = Daemon::start_program(setting, &program, &setting.ufs())?;
        let mounted = daemon.mount(&image.source)?;
        let wanted = image.tree()?;
        let (ends, mounts) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let hog = scope.spawn(|| -> Result<()> {
                while !over.load(Relaxed) {
                    let hog = format!("{enter}; exec tail /dev/zero");
                    let ended = Command::new("sh").args(["-c", &hog]).output()?;
                    let signal = std::os::unix::process::ExitStatusExt::signal(&ended.status);
                    ensure!(signal == Some(9), "it was not short of memory: {ended:?}");
                    ends.fetch_add(1, Relaxed);
                }
                Ok(())
            });
            let reader = scope.spawn(|| -> Result<()> {
                while !over.load(Relaxed) {
                    compare(&wanted, mounted.path(), "memory was short")?;
                }
                Ok(())
            });
            // Other devices come and go meanwhile.
            let mounter = scope.spawn(|| -> Result<()> {
                while !over.load(Relaxed) {
                    let mounted = match daemon.mount(&other.source) {
                        Ok(mounted) => mounted,
                        // Refused, and its reason told.
                        Err(error) if says(&error, "Cannot allocate memory") => {
                            std::thread::sleep(Duration::from_millis(10));
                            continue;
                        }
                        Err(error) => return Err(error),
                    };
                    ensure!(mounted.run(&other.program)? == other.output()?);
                    mounted.unmount()?;
                    mounts.fetch_add(1, Relaxed);
                }
                Ok(())
            });
            let done = || ends.load(Relaxed) >= ENDS && mounts.load(Relaxed) >= MOUNTS;
            let (mut alive, since) = (true, Instant::now());
            while alive
                && !done()
                && since.elapsed() < LONGEST
                && !hog.is_finished()
                && !reader.is_finished()
                && !mounter.is_finished()
            {
                std::thread::sleep(Duration::from_millis(50));
                alive = matches!(daemon.has_ended(), Ok(false));
            }
            over.store(true, Relaxed);
            let hogged = hog.join();
            if !alive {
                // Or the reader would wait for ever.
                daemon.start_again()?;
            }
            for joined in [hogged, reader.join(), mounter.join()] {
                joined.map_err(|_| crate::fail("a thread panicked"))??;
            }
            ensure!(alive, "the daemon was ended");
            ensure!(done(), "{ends:?} ends and {mounts:?} mounts in {LONGEST:?}");
            Ok(())
        })?;
        ensure!(mounted.run(&image.program)? == image.output()?);
        mounted.unmount()?;
        daemon.stop()
    })();
    // The last worker may take a moment to end.
    let mut removed = std::fs::remove_dir(&group);
    for _ in 0..1000 {
        if removed.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        removed = std::fs::remove_dir(&group);
    }
    checked?;
    removed?;
    drop(script);
    before.check_same_now(setting)
}
