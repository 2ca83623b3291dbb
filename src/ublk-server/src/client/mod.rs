//! The client: asks the daemon, and mounts what it exports.
//!
//! The daemon never mounts, so everything that changes mounts is here, under one
//! lock per run directory: two clients never mount or unmount at the same time.

mod mount;
mod show;
mod tidy;
mod upgrade;
mod users;

pub use mount::{mount, unmount};
pub use show::{list, metrics, status};
pub use tidy::{gc, shutdown};
pub use upgrade::upgrade;

use crate::lock::Lock;
use crate::paths::Paths;
use crate::protocol::{Attached, Command, Holder};
use crate::wire;
use accel_client::exports::{device, release};
use accel_ufs::resolve::{ImageName, canonical};
use anyhow::{Context, Result, bail};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The image's name as the daemon wants it: a source in canonical form, so that
/// it means the same from every working directory, or a digest.
fn image_name(text: &str) -> Result<String> {
    Ok(match text.parse::<ImageName>()? {
        ImageName::Source(source) => canonical(&source)?.to_string(),
        name @ ImageName::Manifest(_) => name.to_string(),
    })
}

fn check_daemon(paths: &Paths) -> Result<()> {
    UnixStream::connect(&paths.socket).map(drop).with_context(|| {
        format!(
            "cannot reach the daemon at {}: is `ublk-server serve` running there, and is this root?",
            paths.socket.display()
        )
    })
}

fn lock(paths: &Paths) -> Result<Lock> {
    if !rustix::process::geteuid().is_root() {
        bail!("only root can mount: run this with sudo");
    }
    let path = paths.client_lock();
    Lock::wait(&path).with_context(|| format!("cannot lock {}", path.display()))
}

/// Has the daemon look the image up, before there is a lock that others wait for.
fn prepare(paths: &Paths, image: &str) -> Result<()> {
    let image = image.to_owned();
    wire::ask(&paths.socket, &Command::Prepare { image }, None)
}

/// `ublk-server attach`: exports an image's layers and gives their devices or
/// files, lowest first.
pub fn attach(paths: &Paths, image: &str) -> Result<Vec<PathBuf>> {
    check_daemon(paths)?;
    let image = image_name(image)?;
    prepare(paths, &image)?;
    let lock = lock(paths)?;
    let command = Command::Attach {
        image: image.clone(),
        holder: None,
    };
    let attached: Attached = wire::ask(&paths.socket, &command, None)?;
    let devices = attached.layers.iter().map(|layer| device(paths, layer));
    let devices = devices.collect::<Result<Vec<_>>>();
    let devices = devices.inspect_err(|_| {
        if let Err(error) = release(paths, Holder::Operator(attached.digest.to_string())) {
            tracing::warn!(error = format!("{error:#}"), "cannot undo the attach");
        }
    });
    lock.remove();
    paths.tidy();
    devices
}

/// `ublk-server detach`: the reverse.
pub fn detach(paths: &Paths, image: &str) -> Result<()> {
    check_daemon(paths)?;
    let lock = lock(paths)?;
    let image = image_name(image)?;
    let released = release(paths, Holder::Operator(image.clone()));
    lock.remove();
    paths.tidy();
    if !released? {
        bail!("{image} is not attached at {}", paths.socket.display());
    }
    Ok(())
}
