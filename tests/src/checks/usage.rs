//! Wrong usage ends with a failure that says what is wrong, and breaks nothing.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::Setting;
use crate::daemon::Daemon;
use crate::fixture::image;

/// The command has failed by itself, with a message that has all these words in it.
fn failed_saying(output: &Output, words: &[&str]) -> Result<()> {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it succeeded");
    ensure!(
        output.status.code().is_some(),
        "it ended with {}: {message}",
        output.status
    );
    ensure!(!message.contains("panicked"), "it panicked: {message}");
    for word in words {
        ensure!(
            message.contains(word),
            "the message does not mention {word}: {message}"
        );
    }
    Ok(())
}

fn serve(setting: &Setting, ufs: &OsStr, socket: &OsStr) -> Result<Output> {
    // Bounded: serving successfully would last for ever.
    Command::new("timeout")
        .arg("60")
        .arg(setting.ublk_server())
        .args(["serve", "--transport", &setting.transport, "--ufs"])
        .arg(ufs)
        .arg("--socket")
        .arg(socket)
        .stdin(Stdio::null())
        .output()
        .context("running ublk-server serve")
}

/// `serve --ufs` on a directory that is not there.
pub fn missing_ufs(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let ufs = scratch.path().join("no-such-directory");
    let output = serve(
        setting,
        ufs.as_os_str(),
        scratch.path().join("socket").as_os_str(),
    )?;
    failed_saying(&output, &[&ufs.to_string_lossy()])
}

/// `mount` of an image that was never converted, by SOURCE and by digest.
pub fn image_not_converted(setting: &Setting) -> Result<()> {
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let directory = setting.scratch_dir()?;
    for image in [
        "oci:/no/such/layout:tag",
        &format!("sha256:{}", "0".repeat(64)),
    ] {
        let output = daemon.client([
            OsStr::new("mount"),
            OsStr::new(image),
            directory.path().as_os_str(),
        ])?;
        failed_saying(&output, &[image])?;
    }
    daemon.stop()
}

/// `mount` on a directory that is not there; a later one works.
pub fn mount_point_missing(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let directory = setting.scratch_dir()?;
    let missing = directory.path().join("no-such-directory");
    let output = daemon.client([
        OsStr::new("mount"),
        OsStr::new(&image.source),
        missing.as_os_str(),
    ])?;
    failed_saying(&output, &[&missing.to_string_lossy()])?;
    // `unmount` of what is not mounted.
    let output = daemon.client([OsStr::new("unmount"), directory.path().as_os_str()])?;
    failed_saying(&output, &[&directory.path().to_string_lossy()])?;
    daemon.mount(&image.source)?.unmount()?;
    daemon.stop()
}

/// A second daemon on the socket of a living one is refused, and the first serves on.
pub fn second_daemon(setting: &Setting) -> Result<()> {
    let image = image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mounted = daemon.mount(&image.source)?;
    let output = serve(
        setting,
        setting.ufs().as_os_str(),
        daemon.socket().as_os_str(),
    )?;
    ensure!(
        output.status.code() != Some(124),
        "the second daemon served"
    );
    failed_saying(&output, &[&daemon.socket().to_string_lossy()])?;
    ensure!(mounted.run(&image.program)? == image.output()?);
    mounted.unmount()?;
    daemon.stop()
}

/// A client command where no daemon is.
pub fn no_daemon(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let socket = scratch.path().join("no-such-socket");
    for words in [
        &["list"][..],
        &["mount", "oci:/x:y", "/"],
        &["unmount", "/"],
    ] {
        let output = Command::new(setting.ublk_server())
            .arg(words[0])
            .arg("--socket")
            .arg(&socket)
            .args(&words[1..])
            .stdin(Stdio::null())
            .output()?;
        failed_saying(&output, &[&socket.to_string_lossy()])
            .with_context(|| format!("ublk-server {}", words.join(" ")))?;
    }
    Ok(())
}
