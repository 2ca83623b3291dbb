//! The daemon is killed under fio, which verifies every block that it reads: a second judge of
//! the bytes, which shares no line with ours.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::daemon::Daemon;
use crate::leftovers::State;
use crate::torture::images::{self, Made};
use crate::{Setting, drop_caches};

/// Kills of the daemon.
const KILLS: usize = 6;
/// Only a bound: emulation makes everything slow.
const BOUND: Duration = Duration::from_secs(120);

/// fio on `path`, with the checksums that are in each of its blocks.
fn fio(path: &Path, scratch: &Path, further: &[&str]) -> Result<Output> {
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--bs=64k", "--verify=crc32c"])
        .args(["--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--filename={}", path.display()))
        .args(further)
        .current_dir(scratch)
        .stdin(Stdio::null());
    fio.output().context("running fio")
}

/// Every block once, in any order.
fn verify(path: &Path, scratch: &Path) -> Result<Output> {
    let read = ["--readonly", "--rw=randread", "--direct=1"];
    let deep = ["--ioengine=libaio", "--iodepth=8"];
    fio(path, scratch, &[read.as_slice(), &deep].concat())
}

fn image(setting: &Setting, ufs: &Path, scratch: &Path) -> Result<Made> {
    let written = scratch.join("written");
    let write = ["--rw=write", "--size=24m", "--do_verify=0"];
    let said = fio(&written, scratch, &write)?;
    ensure!(said.status.success(), "fio does not write: {said:?}");
    images::make_of(&setting.bin.join("mkfs-accel"), ufs, scratch, &written)
}

/// Kills the daemon whenever the device has requests under way, which `then` sees to, until
/// `over`; the kills.
fn kill_under_way(
    daemon: &Daemon,
    device: &Path,
    over: impl Fn(usize) -> bool,
    then: impl Fn() -> Result<()>,
) -> Result<usize> {
    let name = device.file_name().context("a device without a name")?;
    let inflight = Path::new("/sys/block").join(name).join("inflight");
    let mut kills = 0;
    while !over(kills) {
        let since = Instant::now();
        // Reads, then writes.
        while fs::read_to_string(&inflight)?.split_whitespace().next() == Some("0") {
            if over(kills) {
                return Ok(kills);
            }
            ensure!(since.elapsed() < BOUND, "fio reads nothing");
        }
        daemon.kill()?;
        kills += 1;
        then()?;
    }
    Ok(kills)
}

/// It is killed with reads under way, recovers, is killed again: fio finds neither an error
/// nor a wrong byte.
pub fn verifies_through_kills(setting: &Setting) -> Result<()> {
    let before = State::now(setting)?;
    let scratch = setting.scratch_dir()?;
    let ufs = scratch.path().join("ufs");
    fs::create_dir(&ufs)?;
    let made = image(setting, &ufs, scratch.path())?;
    let daemon = Daemon::start(setting, &ufs)?;
    let devices = daemon.attach(&made.digest)?;
    let mounted = daemon.mount(&made.digest)?;
    let path = mounted.path().join("it");
    let (rounds, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<()> {
            while !over.load(Relaxed) {
                let said = verify(&path, scratch.path())?;
                ensure!(said.status.success(), "fio: {said:?}");
                rounds.fetch_add(1, Relaxed);
            }
            Ok(())
        });
        let enough = |kills| kills >= KILLS || reader.is_finished();
        let killed = kill_under_way(&daemon, &devices[0], enough, || daemon.start_again());
        over.store(true, Relaxed);
        let read = reader.join();
        read.map_err(|_| crate::fail("the reader panicked"))??;
        ensure!(killed? == KILLS, "too few kills");
        Ok(())
    })?;
    ensure!(rounds.load(Relaxed) > 0);
    mounted.unmount()?;
    daemon.detach(&made.digest)?;
    daemon.stop()?;
    drop(scratch);
    before.check_same_now(setting)
}

/// fio sees a wrong byte that nobody else looks for, and a device that ends with its daemon.
pub fn sees_damage_and_lost_devices(setting: &Setting) -> Result<()> {
    let before = State::now(setting)?;
    let scratch = setting.scratch_dir()?;
    let ufs = scratch.path().join("ufs");
    fs::create_dir(&ufs)?;
    let made = image(setting, &ufs, scratch.path())?;

    let further = ["--without-recovery"];
    let daemon = Daemon::start_with(setting, &setting.ublk_server(), &ufs, &further)?;
    let devices = daemon.attach(&made.digest)?;
    let mounted = daemon.mount(&made.digest)?;
    let path = mounted.path().join("it");
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| {
            loop {
                let said = verify(&path, scratch.path())?;
                if !said.status.success() {
                    return Ok::<_, anyhow::Error>(said);
                }
                drop_caches()?;
            }
        });
        let once = |kills| kills == 1 || reader.is_finished();
        let killed = kill_under_way(&daemon, &devices[0], once, || Ok(()));
        let said = reader.join();
        let said = said.map_err(|_| crate::fail("the reader panicked"))??;
        ensure!(killed? == 1, "it was not killed: {said:?}");
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(text.contains("error"), "fio: {said:?}");
        Ok(())
    })?;
    daemon.start_again()?;
    mounted.unmount()?;
    daemon.stop()?;

    // In the middle of the file, and of a block of it.
    let published = ufs.join(&made.published[0]);
    let file = fs::File::options().write(true).open(&published)?;
    let at = made.image().len() / 2 + 1000;
    file.write_all_at(&[made.image()[at] ^ 1], at as u64)?;
    let daemon = Daemon::start_program(setting, &setting.unverified_ublk_server(), &ufs)?;
    let mounted = daemon.mount(&made.digest)?;
    let said = verify(&mounted.path().join("it"), scratch.path())?;
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    ensure!(
        !said.status.success() && text.contains("verify failed"),
        "fio: {said:?}"
    );
    mounted.unmount()?;
    daemon.stop()?;
    drop(scratch);
    before.check_same_now(setting)
}
