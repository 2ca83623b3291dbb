//! Images that come and go: attach and detach, mount and unmount, whatever else
//! happens. What a kill interrupts is done again, and then has to work.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Scene;
use super::images::Made;
use super::load::Reader;

/// A command that still fails after this time is an error.
const PATIENCE: Duration = Duration::from_secs(240);

/// Does a command until it succeeds, or says one of `also_good`; its output.
pub fn insist(
    scene: &Scene,
    words: &[&str],
    also_good: &[&str],
    mut kill: Option<Duration>,
) -> Result<String> {
    let since = Instant::now();
    loop {
        scene.operating.fetch_add(1, Relaxed);
        let output = match kill.take() {
            None => scene.node.client(words),
            // The client dies, too, once.
            Some(after) => killed(scene, words, after),
        };
        scene.operating.fetch_sub(1, Relaxed);
        let output = output?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            scene.tally.operations.fetch_add(1, Relaxed);
            return Ok(String::from_utf8(output.stdout)?);
        }
        if also_good.iter().any(|good| said.contains(good)) {
            scene.tally.operations.fetch_add(1, Relaxed);
            return Ok(String::new());
        }
        if since.elapsed() > PATIENCE {
            bail!(
                "{} still fails after {PATIENCE:?}: {}",
                words.join(" "),
                said.trim_end()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn killed(scene: &Scene, words: &[&str], after: Duration) -> Result<Output> {
    let mut client = scene.node.command(words).spawn()?;
    std::thread::sleep(after);
    client.kill()?;
    Ok(client.wait_with_output()?)
}

/// Exports an image's layer; its device or file.
///
/// # Errors
/// When that fails for long.
pub fn attach(scene: &Scene, made: &Made, kill: Option<Duration>) -> Result<PathBuf> {
    let said = insist(scene, &["attach", &made.digest], &[], kill)?;
    let path = said.lines().next().context("attach printed nothing")?;
    Ok(path.into())
}

/// The reverse.
///
/// # Errors
/// When that fails for long.
pub fn detach(scene: &Scene, made: &Made, kill: Option<Duration>) -> Result<()> {
    insist(scene, &["detach", &made.digest], &["is not attached"], kill).map(drop)
}

/// Mounts an image.
///
/// # Errors
/// When that fails for long.
pub fn mount(scene: &Scene, made: &Made, root: &Path, kill: Option<Duration>) -> Result<()> {
    let text = root.to_string_lossy();
    let already = ["something is already mounted"];
    insist(scene, &["mount", &made.digest, &text], &already, kill).map(drop)
}

/// The reverse.
///
/// # Errors
/// When that fails for long, or something is still mounted there.
pub fn unmount(scene: &Scene, root: &Path, kill: Option<Duration>) -> Result<()> {
    let text = root.to_string_lossy();
    insist(
        scene,
        &["unmount", &text],
        &["no image is mounted at"],
        kill,
    )?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(&*text))
    {
        bail!("{text} is still mounted after unmount");
    }
    Ok(())
}

/// Comes and goes until the calm.
pub fn churn(scene: &Scene, reader: &mut Reader<'_>, made: &Made, root: &Path) {
    while !scene.is_calm() {
        if let Err(error) = once(scene, reader, made, root) {
            scene.tally.error(&format!("{error:#}"));
            scene.sleep(Duration::from_secs(1));
        }
        scene.sleep(Duration::from_millis(reader.random.below(1500)));
    }
    // With a kill that came last, something may be left.
    for result in [unmount(scene, root, None), detach(scene, made, None)] {
        if let Err(error) = result {
            scene.tally.error(&format!("at the end: {error:#}"));
        }
    }
}

fn once(scene: &Scene, reader: &mut Reader<'_>, made: &Made, root: &Path) -> Result<()> {
    let mut kill = {
        let random = &mut reader.random;
        let mut draw = || (random.below(6) == 0).then(|| Duration::from_millis(random.below(500)));
        [draw(), draw()].into_iter()
    };
    let mut kill = || kill.next().flatten();
    if reader.random.below(2) == 0 {
        let device = attach(scene, made, kill())?;
        reader.device(&device, made, 6);
        detach(scene, made, kill())
    } else {
        mount(scene, made, root, kill())?;
        reader.tree(root, &made.files);
        reader.files(root, &made.files, 6);
        unmount(scene, root, kill())
    }
}
