//! What is mounted can be unmounted, and then nothing of it is left.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::daemon::Daemon;
use crate::fixture::image;
use crate::leftovers::State;
use crate::{Setting, tree};

/// No mount, device, file or process more than before mounting.
pub fn unmount_leaves_nothing(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    // A first round may load a module or start what then stays with the daemon.
    daemon.mount(&image.source)?.unmount()?;
    let before = State::now(setting)?;
    for _ in 0..3 {
        let mounted = daemon.mount(&image.source)?;
        mounted.run(&image.program)?;
        let during = State::now(setting)?;
        ensure!(
            during != before,
            "a mounted image does not show: this check looks at the wrong things"
        );
        ensure!(
            during.mentions(&mounted.path().to_string_lossy()),
            "no mount on {}",
            mounted.path().display()
        );
        mounted.unmount()?;
        before.check_same_now(setting)?;
    }
    daemon.stop()
}

/// Two mounts with common layers: one goes, the other stays whole.
pub fn images_share_layers(setting: &Setting) -> Result<()> {
    let (one, other) = (image(setting, "tiny")?, image(setting, "foreign")?);
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let first = daemon.mount(&one.source)?;
    let again = daemon.mount(&one.source)?;
    let second = daemon.mount(&other.source)?;
    first.unmount()?;
    ensure!(again.run(&one.program)? == one.output()?);
    again.unmount()?;
    crate::drop_caches()?;
    if let Some(report) = tree::difference(&other.tree()?, &tree::manifest(second.path())?) {
        anyhow::bail!("after the other image was unmounted\n{report}");
    }
    second.unmount()?;
    daemon.stop()
}

/// The daemon is killed, again and again, while the image is read: readers wait for
/// the next one, and get the right bytes and no error.
pub fn killed_daemon_is_succeeded(setting: &Setting) -> Result<()> {
    /// Kills, and files read between two of them.
    const KILLS: usize = 4;
    const READS: usize = 3;
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let wanted = image.tree()?;
    let read = || -> Result<()> {
        crate::drop_caches()?;
        match tree::difference(&wanted, &tree::manifest(mounted.path())?) {
            None => Ok(()),
            Some(report) => anyhow::bail!("after a kill\n{report}"),
        }
    };
    read()?;
    let (reads, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    // Without this a read that was under way when the daemon died is never answered.
    let resent = setting.transport == "ublk" || kernel_is_at_least(6, 9)?;
    std::thread::scope(|scope| -> Result<()> {
        let reader = resent.then(|| {
            scope.spawn(|| -> Result<()> {
                while !over.load(Relaxed) {
                    read()?;
                    reads.fetch_add(1, Relaxed);
                }
                Ok(())
            })
        });
        let killed = (0..KILLS).try_for_each(|kill| -> Result<()> {
            if let Some(reader) = &reader {
                while reads.load(Relaxed) < kill * READS && !reader.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // Not between two reads only.
                std::thread::sleep(Duration::from_millis(7 * kill as u64));
            }
            if reader.is_none() {
                // What the kernel reads ahead is under way, too, for a moment.
                std::thread::sleep(Duration::from_secs(2));
            }
            daemon.kill_and_restart()?;
            if reader.is_none() { read() } else { Ok(()) }
        });
        over.store(true, Relaxed);
        if let Some(reader) = reader {
            let read = reader.join();
            read.map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        }
        killed
    })?;
    read()?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()
}

fn kernel_is_at_least(major: u32, minor: u32) -> Result<bool> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    Ok((next(), next()) >= (Some(major), Some(minor)))
}

/// No mount, device, file or process more than before the daemon was started.
pub fn stop_leaves_nothing(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    mounted.run(&image.program)?;
    mounted.unmount()?;
    daemon.stop()?;
    before.check_same_now(setting)
}
