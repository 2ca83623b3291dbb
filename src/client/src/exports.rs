//! From an export of the daemon to something that can be mounted, and back.

use crate::lock::Lock;
use crate::paths::Paths;
use crate::protocol::{AttachedLayer, Command, Detached, DeviceView, Ended, Holder};
use crate::{system, wire};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// Does something to exports and FUSE files, which clients do one at a time. Waits so long for
/// the others. What has become empty is tidied away, whatever came of the work.
///
/// # Errors
/// Others are at it for longer, or the work's own.
pub fn alone<T, E: From<anyhow::Error>>(
    paths: &Paths,
    patience: Duration,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let lock = Lock::wait_within(&paths.client_lock(), patience)?;
    let done = work();
    lock.remove();
    paths.tidy();
    done
}

/// Where a layer's bytes are: a block device, or a file on FUSE, which is
/// mounted here if need be.
pub fn device(paths: &Paths, layer: &AttachedLayer) -> Result<PathBuf> {
    match &layer.device {
        DeviceView::Ublk { path } => Ok(path.clone()),
        DeviceView::Fuse { served } => {
            let path = paths.export(layer.root);
            if !served {
                // What was mounted from a file that nobody serves is dead, too.
                system::detach(&paths.layer(layer.root))?;
                system::serve_file(&paths.socket, layer.root, &path)
                    .with_context(|| format!("cannot mount the FUSE file of {}", layer.name))?;
            }
            Ok(path)
        }
    }
}

/// Tells the daemon that a holder is gone, and unmounts the FUSE files that
/// nobody needs any more. False if the daemon did not know the holder.
pub fn release(paths: &Paths, holder: Holder) -> Result<bool> {
    release_for(paths, holder, None)
}

/// The same; gives up when the daemon says nothing for so long, and may then be
/// repeated.
pub fn release_within(paths: &Paths, holder: Holder, patience: Duration) -> Result<bool> {
    release_for(paths, holder, Some(patience))
}

fn release_for(paths: &Paths, holder: Holder, patience: Option<Duration>) -> Result<bool> {
    let command = Command::Detach { holder };
    let detached: Detached = wire::ask_for(&paths.socket, &command, None, patience)?;
    for Ended { root, device } in detached.ended {
        if matches!(device, DeviceView::Fuse { .. }) {
            let path = paths.export(root);
            // Nobody serves it any more: who still has it open gets errors, and must
            // not keep it there.
            system::detach(&path)?;
            system::unmount_file(&path)?;
        }
    }
    Ok(detached.known)
}
