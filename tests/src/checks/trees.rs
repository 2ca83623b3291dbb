//! A mounted image is what an ordinary unpack of the same image is.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::daemon::Daemon;
use crate::fixture::{Image, image};
use crate::{Setting, drop_caches, tree};

/// Every entry of the tree, from the daemon and again after the kernel was made to
/// forget it.
pub fn tree_is_the_ordinary_unpack(setting: &Setting, image: &Image) -> Result<()> {
    let wanted = image.tree()?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    for round in ["first read", "after dropping caches"] {
        let found = tree::manifest(mounted.path()).with_context(|| daemon.log())?;
        if let Some(report) = tree::difference(&wanted, &found) {
            anyhow::bail!("{round}: the tree differs from the ordinary unpack\n{report}");
        }
        drop_caches()?;
    }
    mounted.unmount()?;
    daemon.stop()
}

/// A program that maps its libraries, on a mount that nothing has read from yet.
pub fn program_runs_and_prints_the_same(setting: &Setting, image: &Image) -> Result<()> {
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let (wanted, found) = (image.output()?, mounted.run(&image.program)?);
    ensure!(
        wanted == found,
        "expected {wanted:?}, the program printed {found:?}"
    );
    mounted.unmount()?;
    daemon.stop()
}

/// The manifest digest names an image as well as its SOURCE does.
pub fn mounts_by_manifest_digest(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.digest)?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()
}

/// With `--rw UPPER` the container can change everything, the image stays, and the
/// changes are there at the next mount.
pub fn writes_go_to_the_upper_directory(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;

    let mounted = daemon.mount(&image.source)?;
    let refused = fs::write(mounted.path().join("new"), "x").expect_err_kind()?;
    ensure!(
        refused == std::io::ErrorKind::ReadOnlyFilesystem,
        "writing without --rw: {refused}"
    );
    mounted.unmount()?;

    let writable = setting.scratch_dir()?;
    let upper = writable.path().join("upper");
    fs::create_dir(&upper)?;
    let arguments = ["--rw".as_ref(), upper.as_os_str()];
    let mounted = daemon.mount_with(&image.source, &arguments)?;
    mounted.run("echo changed >/app/data/greeting; echo new >/new; busybox rm /app/owned")?;
    mounted.unmount()?;

    let mounted = daemon.mount_with(&image.source, &arguments)?;
    let found = mounted.run("cat /app/data/greeting /new; ls /app/owned || true")?;
    ensure!(found == "changed\nnew\n", "at the second mount: {found:?}");
    mounted.unmount()?;

    let mounted = daemon.mount(&image.source)?;
    let found = mounted.run(&image.program)?;
    ensure!(
        found == image.output()?,
        "the image itself changed: {found:?}"
    );
    mounted.unmount()?;
    daemon.stop()
}

trait ExpectErrorKind {
    fn expect_err_kind(self) -> Result<std::io::ErrorKind>;
}

impl ExpectErrorKind for std::io::Result<()> {
    fn expect_err_kind(self) -> Result<std::io::ErrorKind> {
        match self {
            Ok(()) => anyhow::bail!("this should have failed"),
            Err(error) => Ok(error.kind()),
        }
    }
}
