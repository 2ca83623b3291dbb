//! An image is mounted at once: what UFS gives up until then is counted in bytes, where
//! the sources are, so the kernel's own probes and udev's are in it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::fixture::{Image, large, layers};
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
