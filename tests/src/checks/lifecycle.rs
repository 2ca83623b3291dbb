//! What is mounted can be unmounted, and then nothing of it is left.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use accel_transport::ublk::Inventory;
use anyhow::{Context as _, Result, ensure};

use crate::daemon::{Daemon, Succession};
use crate::fixture::image;
use crate::leftovers::State;
use crate::{Setting, tree};

/// Only a bound: emulation makes everything slow.
const BOUND: Duration = Duration::from_secs(60);

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

/// The tree that is mounted at `root`, past the page cache, is the wanted one, also after
/// what has happened.
pub(super) fn compare(wanted: &[String], root: &Path, happened: &str) -> Result<()> {
    crate::drop_caches()?;
    match tree::difference(wanted, &tree::manifest(root)?) {
        None => Ok(()),
        Some(report) => anyhow::bail!("after {happened}\n{report}"),
    }
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
    compare(
        &other.tree()?,
        second.path(),
        "the other image was unmounted",
    )?;
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
    let read = || compare(&wanted, mounted.path(), "a kill");
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

/// Daemons follow each other in every way, in turn, under a reader that compares.
pub fn every_succession_goes_unnoticed(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let wanted = image.tree()?;
    let read = || compare(&wanted, mounted.path(), "a succession");
    read()?;
    let (reads, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let ways = [
        Succession::Upgrade,
        Succession::Kill,
        Succession::Upgrade,
        Succession::Terminate,
    ];
    // A read that was under way at the kill is never answered before that.
    let resent = setting.transport == "ublk" || kernel_is_at_least(6, 9)?;
    let ways: Vec<_> = ways
        .into_iter()
        .filter(|way| resent || *way != Succession::Kill)
        .collect();
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<()> {
            while !over.load(Relaxed) {
                read()?;
                reads.fetch_add(1, Relaxed);
            }
            Ok(())
        });
        let succeeded = (0..).zip(&ways).try_for_each(|(round, way)| {
            let seen = reads.load(Relaxed);
            while reads.load(Relaxed) < seen + 2 && !reader.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(11 * round));
            daemon.succeed(*way, || {})
        });
        over.store(true, Relaxed);
        reader
            .join()
            .map_err(|_| crate::fail("the reader panicked"))??;
        succeeded
    })?;
    if setting.transport == "ublk" && kernel_is_at_least(6, 16)? {
        let log = daemon.whole_log()?;
        let handed = log.lines().filter(|line| line.contains("handed over"));
        let quiesced = |line: &&str| {
            let number = line.split("quiesced=").nth(1);
            number.is_some_and(|number| !number.starts_with('0'))
        };
        let quiesced = handed.filter(quiesced).count();
        ensure!(quiesced > 0, "no device was quiesced\n{}", daemon.log());
    }
    read()?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()
}

/// A device of which the journal's entry is lost: `list` shows it, `gc` removes it,
/// but not while somebody has it open or mounted.
pub fn unknown_devices_are_removed_when_unused(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let devices = daemon.attach(&image.source)?;
    let device = devices[0].to_string_lossy().into_owned();
    let open = std::fs::File::open(&device)?;
    daemon.kill()?;
    std::fs::remove_dir_all(daemon.run().join("journal"))?;
    daemon.start_again()?;
    let said = daemon.ask(["list"])?;
    ensure!(
        said.contains("LEFT OVER") && said.contains(&device),
        "list says: {said}"
    );
    // This very process has it open, and is not to be robbed of it.
    let first = daemon.ask(["gc"])?;
    let said = &first;
    let kept = format!("kept: device {device} ");
    ensure!(
        said.contains(&kept) && said.contains(&std::process::id().to_string()),
        "gc says: {said}"
    );
    ensure!(devices[0].exists());
    drop(open);
    // The others went at once.
    let said = first + &daemon.ask(["gc"])?;
    for device in &devices {
        let removed = format!("removed: device {} ", device.display());
        ensure!(said.contains(&removed), "gc says: {said}");
    }
    ensure!(daemon.ask(["gc"])?.is_empty());
    // And without a daemon.
    daemon.attach(&image.source)?;
    daemon.kill()?;
    std::fs::remove_dir_all(daemon.run().join("journal"))?;
    let said = daemon.ask(["gc"])?;
    ensure!(said.contains("removed: device"), "gc says: {said}");
    daemon.start_again()?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// The daemon is killed when it has a device that its journal does not know yet: the
/// next one removes it by itself.
pub fn device_not_noted_is_removed_at_start(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    daemon.attach(&image.source)?;
    let journal = daemon.run().join("journal");
    let mut temporary = Vec::new();
    for entry in std::fs::read_dir(&journal)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(root) = name.strip_suffix(".json") {
            temporary.push(journal.join(format!(".{root}.tmp")));
        }
    }
    daemon.detach(&image.source)?;
    let none = Inventory::open(BOUND)?.devices()?.len();
    // What the journal would write first: who opens a pipe that nobody reads waits.
    for path in &temporary {
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o600.into(), 0)?;
    }
    std::thread::scope(|scope| -> Result<()> {
        let attaching = scope.spawn(|| daemon.client(["attach", &image.source]));
        let mut waited = Duration::ZERO;
        let made = loop {
            if Inventory::open(BOUND)?.devices()?.len() > none {
                break true;
            }
            if attaching.is_finished() || waited > BOUND {
                break false;
            }
            std::thread::sleep(Duration::from_millis(20));
            waited += Duration::from_millis(20);
        };
        daemon.kill()?;
        let attached = attaching.join();
        let attached = attached.map_err(|_| crate::fail("the client panicked"))??;
        ensure!(made, "no device was made: {attached:?}");
        ensure!(
            !attached.status.success(),
            "attach did not wait: {attached:?}"
        );
        Ok(())
    })?;
    // The device is there, and nothing says whose it is but its mark.
    ensure!(Inventory::open(BOUND)?.devices()?.len() > none);
    for path in &temporary {
        std::fs::remove_file(path)?;
    }
    ensure!(!std::fs::read_dir(&journal)?.any(|entry| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".json"))
    }));
    daemon.start_again()?;
    ensure!(
        Inventory::open(BOUND)?.devices()?.len() == none,
        "the device is still there\n{}",
        daemon.log()
    );
    daemon.stop()?;
    before.check_same_now(setting)
}

/// A journal entry that is cut short costs its device, and no other; once `gc` has
/// removed that, its layer can be exported again.
pub fn damaged_entry_costs_its_device_alone(setting: &Setting) -> Result<()> {
    let image = image(setting, "foreign")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let devices = daemon.attach(&image.source)?;
    ensure!(devices.len() > 1, "an image of one layer shows nothing");
    let read = |devices: &[PathBuf]| -> Result<Vec<Vec<u8>>> {
        crate::drop_caches()?;
        let read = |device: &PathBuf| {
            std::fs::read(device).with_context(|| format!("reading {}", device.display()))
        };
        devices.iter().map(read).collect()
    };
    let wanted = read(&devices)?;
    let number = devices[0].to_string_lossy().replace("/dev/ublkb", "");
    let number: u64 = number.parse()?;
    let mut damaged = None;
    for entry in std::fs::read_dir(daemon.run().join("journal"))? {
        let path = entry?.path();
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        if json["device"].as_u64() == Some(number) {
            let file = std::fs::File::options().write(true).open(&path)?;
            file.set_len(file.metadata()?.len() / 2)?;
            damaged = Some(path);
        }
    }
    let damaged = damaged.ok_or_else(|| crate::fail("no entry is about the device"))?;
    daemon.kill()?;
    daemon.start_again()?;
    let log = std::fs::read_to_string(daemon.socket().with_file_name("log"))?;
    ensure!(
        log.contains(&damaged.display().to_string()),
        "the entry is not named: {log}"
    );
    ensure!(
        read(&devices[1..])? == wanted[1..],
        "the others' bytes differ"
    );
    ensure!(damaged.exists(), "all that is known of a device is gone");
    let said = daemon.ask(["gc"])?;
    let removed = format!("removed: device {} ", devices[0].display());
    ensure!(said.contains(&removed), "gc says: {said}");
    ensure!(!damaged.exists(), "the damaged entry is in the way");
    daemon.detach(&image.source)?;
    ensure!(read(&daemon.attach(&image.source)?)? == wanted);
    daemon.detach(&image.source)?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// A daemon does not start on a journal that a newer version has written, and leaves the
/// devices as they are: the newer one goes on with them.
pub fn newer_journal_is_refused_and_devices_left(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let devices = daemon.attach(&image.source)?;
    let wanted = std::fs::read(&devices[0])?;
    // This one device, not another with its name.
    let mut device = std::fs::File::open(&devices[0])?;
    let ids = || -> Result<BTreeSet<u32>> {
        let devices = Inventory::open(BOUND)?.devices()?;
        Ok(devices.iter().map(|device| device.id).collect())
    };
    let there = ids()?;
    daemon.kill()?;
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(daemon.run().join("journal"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        let mut json: serde_json::Value = serde_json::from_str(&text)?;
        json["layout"] = 99.into();
        std::fs::write(&path, json.to_string())?;
        entries.push((path, text));
    }
    let refused = daemon.start_again();
    let left = ids()?;
    let written = entries.iter().all(|(path, _)| {
        std::fs::read_to_string(path).is_ok_and(|text| text.contains("\"layout\":99"))
    });
    for (path, text) in &entries {
        std::fs::write(path, text)?;
    }
    if refused.is_err() {
        daemon.start_again()?;
    }
    let said = daemon.has_said("layout 99")?;
    ensure!(
        refused.is_err() && said,
        "refused: {refused:?}, told: {said}\n{}",
        daemon.log()
    );
    ensure!(
        written && left == there,
        "entries left: {written}; devices: {left:?} of {there:?}"
    );
    crate::drop_caches()?;
    let mut found = Vec::new();
    device.read_to_end(&mut found)?;
    ensure!(found == wanted, "other bytes");
    drop(device);
    daemon.detach(&image.source)?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// `detach` of a device that somebody has mounted is refused, and the daemon is killed
/// before it can say so: the next one goes on with the device.
pub fn removal_of_a_device_in_use_is_taken_back(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let devices = daemon.attach(&image.source)?;
    let root = setting.scratch_dir()?;
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount(&devices[0], root.path(), "erofs", flags, None)?;
    let wanted = tree::manifest(root.path())?;
    let checked = (|| -> Result<()> {
        let being_removed = || -> Result<bool> {
            for entry in std::fs::read_dir(daemon.run().join("journal"))? {
                let path = entry?.path();
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                // What is not written whole does not count.
                let whole = path.extension().is_some_and(|end| end == "json");
                if whole && text.contains("\"deleting\"") {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        std::thread::scope(|scope| -> Result<()> {
            let detaching = scope.spawn(|| daemon.client(["detach", &image.source]));
            while !being_removed()? && !detaching.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
            }
            daemon.kill()?;
            let detached = detaching.join();
            let detached = detached.map_err(|_| crate::fail("the client panicked"))??;
            ensure!(!detached.status.success(), "detached: {detached:?}");
            Ok(())
        })?;
        ensure!(being_removed()?, "it was not killed in time");
        daemon.start_again()?;
        compare(&wanted, root.path(), "a detach that was refused")
    })();
    rustix::mount::unmount(root.path(), rustix::mount::UnmountFlags::empty())?;
    checked.with_context(|| daemon.log())?;
    daemon.detach(&image.source)?;
    daemon.stop()?;
    drop(root);
    before.check_same_now(setting)
}

/// A device is lost for good while it is mounted: the next daemon waits for nobody who
/// still uses it, and the same image can be mounted again beside it.
pub fn lost_device_in_use_is_in_nobodys_way(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let further = ["--without-recovery"];
    let program = setting.ublk_server();
    let daemon = Daemon::start_with(setting, &program, &setting.ufs(), &further)?;
    let lost = daemon.mount(&image.source)?;
    ensure!(lost.run(&image.program)? == image.output()?);
    daemon.kill()?;
    daemon.start_again()?;
    let left = std::fs::read_dir(daemon.run().join("journal"))?.count();
    ensure!(
        left == 0,
        "the journal has {left} entries\n{}",
        daemon.log()
    );
    let mounted = daemon.mount(&image.source)?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    compare(&image.tree()?, mounted.path(), "a device was lost")?;
    lost.unmount()?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// The daemon's program is broken, and its supervisor gives up: `ublk-rescue` has
/// readers get errors, what is mounted can be unmounted, and the node is of use.
pub fn broken_program_is_rescued(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    mounted.run(&image.program)?;
    let rescue = |after: &str| -> Result<String> {
        let mut rescue = Command::new(setting.bin.join("ublk-rescue"));
        rescue
            .args(["--after", after, "--socket"])
            .arg(daemon.socket());
        let output = rescue.output()?;
        ensure!(output.status.success(), "ublk-rescue: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    // As long as a daemon serves, it does nothing.
    ensure!(rescue("0s")?.contains("nothing to rescue"));
    mounted.run(&image.program)?;
    let broken = daemon.run().with_extension("broken");
    std::fs::write(&broken, "this is no program")?;
    daemon.kill()?;
    // What a supervisor does: a start fails, and another, and then it gives up.
    for _ in 0..3 {
        ensure!(Command::new(&broken).status().is_err(), "it is not broken");
    }
    std::fs::remove_file(&broken)?;
    crate::drop_caches()?;
    let root = mounted.path().to_owned();
    let wanted = image.tree()?;
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(move || tree::manifest(&root));
        // Who reads waits; that is all that can be done for the moment.
        std::thread::sleep(Duration::from_millis(500));
        let waits = !reader.is_finished();
        let said = rescue("1s")?;
        ensure!(
            said.contains("stopped") || said.contains("closed"),
            "ublk-rescue says: {said}"
        );
        let read = reader
            .join()
            .map_err(|_| crate::fail("the reader panicked"))?;
        let failed =
            read.is_err() || read.is_ok_and(|tree| tree::difference(&wanted, &tree).is_some());
        ensure!(
            waits && failed,
            "the reader did not wait ({waits}) or saw no error ({failed})"
        );
        Ok(())
    })?;
    mounted.unmount()?;
    daemon.start_again()?;
    let mounted = daemon.mount(&image.source)?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()?;
    before.check_same_now(setting)
}

/// The daemon serves, and is upgraded, under restrictions like those of its unit.
pub fn serves_in_a_sandbox(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let before = State::now(setting)?;
    let script = setting.scratch_dir()?;
    let program = script.path().join("sandboxed");
    // As deploy/systemd/ublk-server.service: a mount namespace that gets the host's
    // mounts, all of it read-only but for the run directory; four capabilities to begin
    // with; no new privileges.
    let text = format!(
        "#!/bin/sh\nset -e\n[ \"$1\" = serve ] || exec {0} \"$@\"\n\
         exec unshare --mount --propagation slave sh -ec '\n\
             mount --bind {1} {1}\n\
             mount -o remount,bind,ro /\n\
             if touch /usr/not-to-be 2>/dev/null; then exit 9; fi\n\
             exec setpriv --no-new-privs --inh-caps=-all \\\n\
                 --bounding-set=-all,+sys_admin,+sys_chroot,+sys_resource,+setpcap {0} \"$@\"' sh \"$@\"\n",
        setting.ublk_server().display(),
        setting.scratch.display(),
    );
    std::fs::write(&program, text)?;
    std::fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let daemon = Daemon::start_program(setting, &program, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    for way in [Succession::Upgrade, Succession::Kill] {
        crate::drop_caches()?;
        ensure!(mounted.run(&image.program)? == image.output()?);
        daemon.succeed(way, || {})?;
    }
    if let Some(report) = tree::difference(&image.tree()?, &tree::manifest(mounted.path())?) {
        anyhow::bail!("{report}");
    }
    mounted.unmount()?;
    daemon.stop()?;
    drop(script);
    before.check_same_now(setting)
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
