//! An image is mounted at once: what UFS gives up until then is counted in bytes, where
//! the sources are, so the kernel's own probes and udev's are in it. With our rules udev
//! has none.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{major, minor};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::fixture::{Image, image, large, layers};
use crate::{Setting, drop_caches};

/// What an image may take of UFS until it is mounted.
const MOST: u64 = 1 << 20;
/// Only a bound for what never comes. Emulation makes everything slow.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of the layer that has to be as cheap as any.
const LARGE: u64 = 7 << 30;

/// Any of the images.
pub fn takes_at_most_1_mib(setting: &Setting, image: &Image) -> Result<()> {
    mount_and_count(setting, &image.source)
}

/// One with a layer of 7 GiB.
pub fn large_layer_takes_at_most_1_mib(setting: &Setting) -> Result<()> {
    let digest = large(setting)?;
    let layers = layers(&setting.ufs(), &digest)?;
    let sizes = layers.iter().map(|layer| layer.erofs.metadata());
    let sizes = sizes.map(|size| Ok(size?.len()));
    let largest = sizes.collect::<Result<Vec<_>>>()?.into_iter().max();
    ensure!(
        largest > Some(LARGE),
        "the layer has {largest:?} bytes only"
    );
    mount_and_count(setting, &digest)
}

fn mount_and_count(setting: &Setting, image: &str) -> Result<()> {
    let daemon = Daemon::start(setting, &setting.ufs())?;
    drop_caches()?;
    let mounted = daemon.mount(image)?;
    let status =
        || -> Result<Value> { Ok(serde_json::from_str(&daemon.ask(["status", "--json"])?)?) };
    let started = Instant::now();
    let (status, ready) = loop {
        let status = status()?;
        let ready = status["holders"][0]["ready"].clone();
        if ready["metadata_ms"].is_u64() {
            break (status, ready);
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "metadata does not get complete: {status}"
        );
        std::thread::sleep(Duration::from_millis(50));
    };
    let number = |value: &Value| {
        value
            .as_u64()
            .with_context(|| format!("no number in {status}"))
    };
    let (until, behind) = (
        number(&ready["mounted_bytes"])?,
        number(&ready["metadata_bytes"])?,
    );
    let all = number(&status["fetched_bytes"])?;
    println!("{image}: {until} bytes until mounted, {behind} of metadata behind, {all} in all");
    ensure!(until > 0 && behind > 0, "nothing is counted: {ready}");
    ensure!(
        until <= MOST,
        "{until} bytes were read before the mount: {status}"
    );
    // What was not read in the background was asked for, by mount or by whoever looks at
    // a new device. At loop devices udev looks once the image is mounted.
    let probed = fs::read_to_string("/proc/self/mountinfo")?.contains(" - erofs /dev/loop");
    let asked = all
        .checked_sub(behind)
        .with_context(|| format!("not all is counted: {status}"))?;
    ensure!(
        asked >= until && (asked <= MOST || probed),
        "{asked} bytes were asked for: {status}"
    );
    mounted.unmount()?;
    daemon.stop()
}

/// Rules of this boot.
const UDEV: &str = "/run/udev/rules.d";
/// What newer versions of systemd do with such devices, at the place where they do it.
const PROBES: &str = r#"SUBSYSTEM!="block", GOTO="end"
ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=="1", GOTO="end"
KERNEL=="ublkb*", IMPORT{builtin}="blkid"
LABEL="end"
ACTION!="remove", SUBSYSTEM=="block", KERNEL=="ublkb*", OPTIONS+="watch"
"#;

/// The rules in `deploy/udev/` keep udev from reading devices and from watching them.
pub fn udev_leaves_devices_alone(setting: &Setting) -> Result<()> {
    fs::create_dir_all(UDEV)?;
    let probes = TestRules::write("60-accel-probes.rules", PROBES)?;
    let (probed, watched) = seen_by_udev(setting)?;
    ensure!(
        probed && watched,
        "the test's rules do nothing: {probed} {watched}"
    );
    let ours = include_str!("../../../deploy/udev/59-image-accel.rules");
    let ours = TestRules::write("59-image-accel.rules", ours)?;
    let (probed, watched) = seen_by_udev(setting)?;
    ensure!(!probed, "udev has read a device");
    ensure!(!watched, "udev watches a device");
    ours.remove()?;
    probes.remove()
}

/// Whether udev knows what is on an image's devices, and whether it watches them.
fn seen_by_udev(setting: &Setting) -> Result<(bool, bool)> {
    let image = image(setting, "tiny")?.source;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let (mut probed, mut watched) = (false, false);
    for device in daemon.attach(&image)? {
        run("udevadm", &["settle", "--timeout=120"])?;
        let path = device.to_str().context("a path that is no text")?;
        let known = run("udevadm", &["info", "--query=property", "--name", path])?;
        probed |= known.contains("ID_FS_TYPE=erofs");
        let number = fs::metadata(&device)?.rdev();
        let number = format!("b{}:{}", major(number), minor(number));
        watched |= Path::new("/run/udev/watch")
            .join(number)
            .symlink_metadata()
            .is_ok();
    }
    daemon.detach(&image)?;
    daemon.stop()?;
    Ok((probed, watched))
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Rules that udev has until this is dropped.
struct TestRules(PathBuf);

impl TestRules {
    fn write(name: &str, rules: &str) -> Result<Self> {
        let path = Path::new(UDEV).join(name);
        fs::write(&path, rules)?;
        let written = Self(path);
        run("udevadm", &["control", "--reload"])?;
        Ok(written)
    }

    fn remove(self) -> Result<()> {
        fs::remove_file(&self.0)?;
        run("udevadm", &["control", "--reload"]).map(drop)
    }
}

impl Drop for TestRules {
    fn drop(&mut self) {
        // Gone already unless a check failed.
        let _ = fs::remove_file(&self.0);
    }
}
