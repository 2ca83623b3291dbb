//! Lazily loaded layers as the kernel has them: exported by `ublk-server`, mounted
//! here.
//!
//! Every layer has one mount point, whichever snapshots need it. What is done to
//! layers is done by one thread at a time, and under the lock that all clients of
//! the daemon share. Everything here may wait for the daemon, and so for UFS, but
//! not for ever.

use crate::mounts::Places;
use crate::remote;
use crate::snapshot::{Labels, Layer, Trust};
use accel_client::exports::{alone, device, release_within};
use accel_client::paths::Paths;
use accel_client::protocol::{
    Command, DeviceView, ExportStatus, FindAnswer, Holder, LayerAnswer, Status,
};
use accel_client::system::{self, MountFlags};
use accel_client::{mountinfo, wire};
use accel_oci::{ChainId, Digest};
use accel_ufs::annotations::LayerAnnotations;
use accel_ufs::index::Root;
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the daemon may take to export a layer. UFS has its own, shorter limits
/// there.
const EXPORT: Duration = Duration::from_secs(60);
/// How long it may take to say how it is.
const STATUS: Duration = Duration::from_secs(10);
/// How long the start of the snapshotter waits for that.
const LOOK: Duration = Duration::from_secs(2);
/// How long other clients may mount.
const LOCK: Duration = Duration::from_secs(60);

/// Why a layer cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum LayerFailure {
    /// It was not converted to the daemon's UFS.
    #[error(
        "the layer is not on UFS; is that mounted where ublk-server looks for it (`ublk-server status`)?"
    )]
    Absent,
    /// What was converted is something else.
    #[error("UFS has the layer with the root {0}, not with the one in the manifest")]
    OtherRoot(Root),
    /// UFS does not answer, or its index is damaged.
    #[error("{0}")]
    Unreadable(String),
    /// The daemon does not answer, or a mount fails.
    #[error("{0:#}")]
    Other(anyhow::Error),
}

impl From<anyhow::Error> for LayerFailure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// What the holders of the layers begin with that the snapshotter with this root directory has.
pub fn holders(root: &Path) -> String {
    format!("accel-snapshotter {} ", root.display())
}

/// Mounts layers.
#[derive(Debug)]
pub struct Layers {
    places: Places,
    server: Paths,
    /// The only UFS that layers may come from.
    ufs: Option<PathBuf>,
    one: Mutex<()>,
    /// Where layers are from.
    origins: Mutex<HashMap<Root, LayerOrigin>>,
}

/// Where a layer is from: hints for the daemon.
#[derive(Debug, Clone, Default)]
struct LayerOrigin {
    /// An image that has it, to make it again from.
    source: Option<String>,
    /// What that image's record is called.
    image: Option<Digest>,
}

impl Layers {
    /// Mounts beneath `places` what the daemon at `server` exports; if `ufs` is named,
    /// only what it has from there.
    pub fn new(places: Places, server: Paths, ufs: Option<PathBuf>) -> Self {
        Self {
            places,
            server,
            ufs,
            one: Mutex::default(),
            origins: Mutex::default(),
        }
    }

    fn origins(&self) -> MutexGuard<'_, HashMap<Root, LayerOrigin>> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which image a layer is of, if containerd's labels of its snapshot say so.
    pub fn note_origin(&self, root: Root, labels: &Labels) {
        let (source, image) = (remote::origin(labels), remote::image(labels));
        if source.is_some() || image.is_some() {
            self.origins().insert(root, LayerOrigin { source, image });
        }
    }

    /// Keeps others from changing layers.
    pub fn operate(&self) -> MutexGuard<'_, ()> {
        self.one.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the daemon is.
    pub fn server(&self) -> &Path {
        &self.server.socket
    }

    /// The UFS that layers have to come from, if one was named.
    pub fn ufs(&self) -> Option<&Path> {
        self.ufs.as_deref()
    }

    /// Fails if the daemon is there and reads another UFS than the one that was named.
    pub fn check_ufs(&self) -> Result<()> {
        let Some(ufs) = &self.ufs else {
            return Ok(());
        };
        let server = &self.server.socket;
        match wire::ask_within::<Status>(server, &Command::Status, LOOK) {
            Ok(status) if status.ufs != *ufs => bail!(
                "ublk-server at {} reads the UFS {}, not {}: give both the same --ufs, or this one another --server",
                server.display(),
                status.ufs.display(),
                ufs.display()
            ),
            // It may be started later. Then it is asked with each layer.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Under which name the daemon knows who needs a layer.
    fn holder(&self, root: Root) -> String {
        format!("{}{root}", self.holders())
    }

    fn holders(&self) -> String {
        holders(self.places.root())
    }

    /// Mount points of layers that something is mounted at, as the kernel knows them,
    /// and the device or file that it is.
    pub fn mounted(&self) -> io::Result<HashMap<PathBuf, PathBuf>> {
        let mounts = mountinfo::mounts(&mountinfo::read()?, "erofs");
        let layers = self.places.layers();
        Ok(mounts
            .into_iter()
            .filter(|(point, _)| point.starts_with(&layers))
            .collect())
    }

    /// Whether the layer is mounted at its mount point. What somebody else has put there is
    /// no layer.
    pub fn is_mounted(&self, layer: &Layer) -> Result<bool> {
        system::is_erofs(&self.places.layer(layer.number))
    }

    /// What UFS has for a chain ID on top of `below`: nobody else vouches for that.
    /// `digest`: of the layer's blob, if it is known.
    pub fn find(
        &self,
        chain_id: ChainId,
        below: Option<ChainId>,
        digest: Option<Digest>,
    ) -> Result<LayerAnnotations, LayerFailure> {
        let command = Command::FindLayer {
            chain_id,
            below,
            digest,
            ufs: self.ufs.clone(),
        };
        match wire::ask_within(&self.server.socket, &command, EXPORT)? {
            FindAnswer::Found {
                diff_id,
                root,
                size,
            } => Ok(LayerAnnotations {
                diff_id,
                root,
                size,
            }),
            FindAnswer::Absent => Err(LayerFailure::Absent),
            FindAnswer::Unreadable(why) => Err(LayerFailure::Unreadable(why)),
        }
    }

    /// Sees to it that a layer is mounted. `stale`: what is mounted is of no use any
    /// more.
    pub fn ensure(&self, layer: &Layer, stale: bool) -> Result<(), LayerFailure> {
        let _one = self.operate();
        let point = self.places.layer(layer.number);
        let mounted = self.is_mounted(layer)?;
        if mounted && !stale {
            return Ok(());
        }
        alone(&self.server, LOCK, || self.mount(layer, &point, mounted))
    }

    fn mount(&self, layer: &Layer, point: &Path, mounted: bool) -> Result<(), LayerFailure> {
        let holder = self.holder(layer.root);
        let origin = self.origins().get(&layer.root).cloned().unwrap_or_default();
        let command = Command::AttachLayer {
            diff_id: layer.diff_id,
            chain_id: layer.chain_id,
            root: layer.root,
            size: layer.size,
            origin: origin.source,
            image: origin.image,
            holder: holder.clone(),
            by_ufs: layer.trust == Trust::Ufs,
            ufs: self.ufs.clone(),
        };
        let attached = match wire::ask_within(&self.server.socket, &command, EXPORT)? {
            LayerAnswer::Attached(attached) => attached,
            LayerAnswer::Absent => return Err(LayerFailure::Absent),
            LayerAnswer::OtherRoot(root) => return Err(LayerFailure::OtherRoot(root)),
            LayerAnswer::Unreadable(why) => return Err(LayerFailure::Unreadable(why)),
        };
        if mounted {
            system::detach(point)?;
        }
        if matches!(attached.device, DeviceView::Fuse { served: false }) {
            system::detach(&self.server.export(layer.root))?;
        }
        let device = device(&self.server, &attached)?;
        let _mounted = system::mount_layer(&device, point, attached.uuid, MountFlags::empty())
            .with_context(|| format!("cannot mount {}", attached.name))?;
        if let Err(error) =
            wire::ask_within::<()>(&self.server.socket, &Command::Mounted { holder }, STATUS)
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "metadata will not be fetched ahead"
            );
        }
        Ok(())
    }

    /// Unmounts a layer and gives it back to the daemon. The caller holds
    /// [`Layers::operate`]. May be repeated after an error.
    pub fn end(&self, layer: &Layer) -> Result<()> {
        alone(&self.server, LOCK, || self.unmount(layer))
    }

    fn unmount(&self, layer: &Layer) -> Result<()> {
        system::unmount_directory(&self.places.layer(layer.number))?;
        let holder = self.holder(layer.root);
        let export = self.export(layer.root)?;
        let file = self.server.export(layer.root);
        match export {
            // The file must not go while an overlay, which has the layer open still,
            // reads from it.
            Some(ExportStatus {
                device: DeviceView::Fuse { .. },
                holders,
                ..
            }) if holders == [holder.as_str()] => system::unmount_file(&file)?,
            // The daemon that served it is gone.
            None => system::unmount_file(&file)?,
            Some(_) => {}
        }
        release_within(&self.server, Holder::Layer(holder), EXPORT).map(drop)
    }

    fn export(&self, root: Root) -> Result<Option<ExportStatus>> {
        let exports = self.status()?.exports;
        Ok(exports.into_iter().find(|export| export.root == root))
    }

    fn status(&self) -> Result<Status> {
        wire::ask_within(&self.server.socket, &Command::Status, STATUS)
    }

    /// Compares what is mounted with what is served: the layers of which mount or
    /// export is gone.
    pub fn broken(&self, needed: &[Layer]) -> Result<Vec<Layer>> {
        let status = self.status()?;
        let mounted = self.mounted().context("cannot read the list of mounts")?;
        let whole = |layer: &&Layer| {
            let holder = self.holder(layer.root);
            let served = status.exports.iter().any(|export| {
                export.root == layer.root
                    && export.holders.contains(&holder)
                    && !matches!(export.device, DeviceView::Fuse { served: false })
            });
            served && mounted.contains_key(&self.places.layer(layer.number))
        };
        Ok(needed
            .iter()
            .filter(|layer| !whole(layer))
            .copied()
            .collect())
    }

    /// Gives back what the daemon holds for layers that are not known any more.
    pub fn forget_others(&self, known: &[Layer]) -> Result<()> {
        let _one = self.operate();
        let known: HashSet<_> = known.iter().map(|layer| self.holder(layer.root)).collect();
        let prefix = self.holders();
        for holder in self.status()?.holders {
            let name = holder.holder;
            if name.starts_with(&prefix) && !known.contains(&name) {
                alone(&self.server, LOCK, || {
                    release_within(&self.server, Holder::Layer(name), EXPORT)
                })?;
            }
        }
        Ok(())
    }
}
