//! What is mounted can be unmounted, and then nothing of it is left.

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
