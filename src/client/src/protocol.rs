//! What client and daemon say to each other over the admin socket.
//!
//! One request per connection: a line of JSON from the client, possibly with one
//! file descriptor, and a line of JSON back: `{"ok": …}` or `{"error": "…"}`.
//! Client and daemon are the same version; fields a peer does not know are ignored.

use accel_oci::{ChainId, DiffId, Digest};
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::Uuid;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The longest line.
pub const MAX_LINE: usize = 4 << 20;

/// What a client asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Look an image up, so that attaching it in the next seconds does not wait for
    /// UFS: who attaches holds a lock that others wait for.
    Prepare {
        /// Canonical source, or manifest digest.
        image: String,
    },
    /// Export the layers of an image.
    Attach {
        /// Canonical source, or manifest digest.
        image: String,
        /// Who needs it: a mount's directory; none for an operator's `attach`.
        holder: Option<String>,
    },
    /// Export one layer, whose root the client knows from elsewhere than UFS;
    /// answered with a [`LayerAnswer`].
    AttachLayer {
        /// Which layer.
        diff_id: DiffId,
        /// And on top of which others.
        chain_id: ChainId,
        /// What its bytes must have.
        root: Root,
        /// How many there are.
        size: ImageSize,
        /// An image that has the layer, as `mkfs-accel convert` takes it, to make it
        /// again from if it is lost.
        #[serde(default)]
        origin: Option<String>,
        /// The name of an image record on UFS that has the layer: those on top of it will
        /// be asked for next. A hint.
        #[serde(default)]
        image: Option<Digest>,
        /// Who needs it; a text that does not begin with `/`.
        holder: String,
        /// The root comes from a [`Command::FindLayer`]: nobody but UFS vouches for it.
        #[serde(default)]
        by_ufs: bool,
        /// The UFS that it must come from; none: whichever the daemon has. Another one's
        /// layer is [`LayerAnswer::Unreadable`].
        #[serde(default)]
        ufs: Option<PathBuf>,
    },
    /// Export a node's canary ([`accel_ufs::canary`]); answered with a [`LayerAnswer`].
    AttachCanary {
        /// Which.
        digest: Digest,
        /// What its bytes must have.
        root: Root,
        /// How many there are.
        size: ImageSize,
        /// Who needs it; a text that does not begin with `/`.
        holder: String,
    },
    /// What UFS has for a chain ID, on its word alone; answered with a
    /// [`FindAnswer`].
    FindLayer {
        /// Which layer.
        chain_id: ChainId,
        /// What it stands on; none for the lowest.
        below: Option<ChainId>,
        /// Digest of its blob in the registry, if that is known: a chain ID does not
        /// tell the diffID of any but the lowest layer.
        digest: Option<Digest>,
        /// As for [`Command::AttachLayer`].
        #[serde(default)]
        ufs: Option<PathBuf>,
    },
    /// Note that a holder no longer needs its image, and end exports that nobody
    /// needs.
    Detach {
        /// The holder.
        holder: Holder,
    },
    /// Serve a layer on a FUSE file system just mounted; its `/dev/fuse` comes
    /// with the request.
    Serve {
        /// The layer.
        root: Root,
    },
    /// A holder's mount is in place: its metadata may be fetched ahead.
    Mounted {
        /// The holder.
        holder: String,
    },
    /// Everything there is to say.
    Status,
    /// The metrics, in Prometheus' text format.
    Metrics,
    /// Have another program, usually another version of this one, take this daemon's
    /// place; answered with an [`Upgrading`]. The connection ends when it has.
    Upgrade {
        /// The program's absolute path.
        program: PathBuf,
    },
    /// Devices that are this daemon's by their mark, and that it knows nothing of;
    /// answered with a list of [`Orphan`]s.
    Orphans {
        /// Remove these, unless they are mounted; the answer is what is left of all.
        remove: Vec<u32>,
    },
}

/// Who holds an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// The mount at this directory.
    Mount(String),
    /// An operator's `attach` of this image (source or manifest digest).
    Operator(String),
    /// The holder of [`Command::AttachLayer`] or [`Command::AttachCanary`].
    Layer(String),
}

/// The daemon's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// It went well.
    Ok(T),
    /// It did not.
    Error(String),
    /// It did not, and may soon: another program is taking the daemon's place, or memory is
    /// short.
    Again(String),
}

/// How a layer can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "snake_case")]
pub enum DeviceView {
    /// A block device.
    Ublk {
        /// `/dev/ublkbN`.
        path: PathBuf,
    },
    /// A file on FUSE, which the client mounts.
    Fuse {
        /// Whether it is served already.
        served: bool,
    },
}

/// A layer of an attached image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttachedLayer {
    /// What it is called on UFS.
    pub name: String,
    /// Its BLAKE3.
    pub root: Root,
    /// Its size.
    pub size: ImageSize,
    /// The UUID its superblock must have.
    pub uuid: Uuid,
    /// Where it is.
    pub device: DeviceView,
}

/// Answer to [`Command::Attach`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attached {
    /// Digest of the manifest, or of the layer.
    pub digest: Digest,
    /// Lowest first.
    pub layers: Vec<AttachedLayer>,
}

/// Answer to [`Command::AttachLayer`] and [`Command::AttachCanary`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerAnswer {
    /// It is exported.
    Attached(AttachedLayer),
    /// It is not on UFS.
    Absent,
    /// UFS has it with another root.
    OtherRoot(Root),
    /// UFS does not answer, or has no index that could be read, or it is another one than
    /// was asked for.
    Unreadable(String),
}

/// Answer to [`Command::FindLayer`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindAnswer {
    /// What UFS says.
    Found {
        /// Together with what it stands on this makes the chain ID: that is checked.
        diff_id: DiffId,
        /// What its bytes should have.
        root: Root,
        /// How many there should be.
        size: ImageSize,
    },
    /// It is not on UFS.
    Absent,
    /// UFS does not answer, or has no index or record that could be read, or it is another
    /// one than was asked for.
    Unreadable(String),
}

/// An export that nobody needs any more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ended {
    /// The layer.
    pub root: Root,
    /// How it was exported; a FUSE file is the client's to unmount.
    pub device: DeviceView,
}

/// Answer to [`Command::Detach`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Detached {
    /// Whether the holder was known.
    pub known: bool,
    /// What ended.
    pub ended: Vec<Ended>,
}

/// Answer to [`Command::Upgrade`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Upgrading {
    /// The version that ends.
    pub from: String,
    /// The version that follows.
    pub to: String,
}

/// A device that no journal knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Orphan {
    /// `N` of `/dev/ublkbN`.
    pub device: u32,
    /// What the driver says of it; for people.
    pub state: String,
    /// Why it is still there, if it was to be removed.
    pub kept: Option<String>,
}

/// Answer to [`Command::Status`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Its program.
    #[serde(default)]
    pub program: PathBuf,
    /// The UFS directory.
    pub ufs: PathBuf,
    /// `ublk` or `fuse`.
    pub transport: String,
    /// Why this one.
    pub transport_reason: String,
    /// Process id of what keeps FUSE connections beyond the daemon, while there are
    /// any.
    pub keeper: Option<i32>,
    /// False only in builds for one test.
    pub verifies: bool,
    /// Bytes read from the source since the daemon started, of everything.
    pub fetched_bytes: u64,
    /// The memory cache.
    pub cache: CacheStatus,
    /// The tier on local disk, if there is one.
    #[serde(default)]
    pub disk_cache: Option<DiskCacheStatus>,
    /// Layers that are made again, if that is done.
    #[serde(default)]
    pub remake: Option<RemakeStatus>,
    /// The sources, best first.
    pub sources: Vec<SourceStatus>,
    /// Reads that failed at every source.
    pub failed_reads: u64,
    /// What is exported.
    pub exports: Vec<ExportStatus>,
    /// Who needs it.
    pub holders: Vec<HolderStatus>,
}

/// The memory cache, in bytes and pieces of requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Bytes it may hold.
    pub size: u64,
    /// Bytes of chunks it holds.
    pub used: u64,
    /// Look-ups served from it.
    pub hits: u64,
    /// Look-ups that read.
    pub misses: u64,
    /// Look-ups that waited for another's read.
    pub joined: u64,
    /// Chunks evicted.
    pub evicted: u64,
}

/// The disk cache, in bytes and pieces: chunks and pages of indexes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskCacheStatus {
    /// Its name.
    pub name: String,
    /// Whether it is in use, or why not; for people.
    pub state: String,
    /// Whether it is read and written.
    pub in_use: bool,
    /// Bytes that its files may have.
    pub size: u64,
    /// Bytes of slots that hold something.
    pub used: u64,
    /// Whether all of that would be known after a restart.
    pub saved: bool,
    /// Requests answered from it.
    pub hits: u64,
    /// Requests for what it does not hold.
    pub misses: u64,
    /// Pieces written to it.
    pub written: u64,
    /// Pieces that were not written, because the disk was too slow or left alone.
    pub skipped: u64,
    /// Pieces evicted.
    pub evicted: u64,
    /// Pieces that had changed on disk, and were fetched again.
    pub damaged: u64,
    /// Reads and writes that failed or took too long.
    pub failed: u64,
}

/// Layers that are made again from the original image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemakeStatus {
    /// Where they lie.
    pub directory: PathBuf,
    /// Exported layers of which it is known where they came from.
    pub known: usize,
    /// Those that something was done about.
    pub layers: Vec<RemadeLayer>,
    /// Layers that were made since the daemon started.
    pub made: u64,
    /// Attempts that failed.
    pub failed: u64,
}

/// A layer that is, was or cannot be made again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemadeLayer {
    /// What it is called on UFS.
    pub name: String,
    /// How it stands; for people.
    pub state: String,
}

/// One source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its name.
    pub name: String,
    /// Whether it is in use, or set aside, why, and until when; for people.
    pub state: String,
    /// Whether it is in use.
    pub in_use: bool,
    /// How often it was set aside.
    pub set_aside: u64,
    /// Process id of its worker.
    pub worker: Option<u32>,
    /// Workers started so far.
    pub workers: u64,
    /// Workers that were killed and have not ended: stuck in the kernel.
    pub dying: usize,
    /// Reads that went well.
    pub reads: u64,
    /// What its files were asked for: neighbours are read in one operation.
    #[serde(default)]
    pub operations: u64,
    /// Bytes that it gave.
    pub bytes: u64,
    /// Attempts that failed or ran out of time.
    pub failed_attempts: u64,
}

/// One export.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExportStatus {
    /// What it is called on UFS.
    pub name: String,
    /// Its BLAKE3.
    pub root: Root,
    /// Its size in bytes.
    pub size: u64,
    /// Where it is.
    pub device: DeviceView,
    /// What vouches for the root: `ufs`, or `manifest` if every holder named it.
    pub trust: String,
    /// Who needs it.
    pub holders: Vec<String>,
    /// Pieces of requests served from memory.
    pub hits: u64,
    /// Pieces that waited for a read.
    pub misses: u64,
    /// Bytes given to the kernel.
    pub served_bytes: u64,
    /// Bytes read from the source for it.
    pub source_bytes: u64,
    /// Pieces that failed.
    pub errors: u64,
}

/// What it took until an image was ready: bytes that UFS gave for it, and time since it
/// was asked for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ReadyStatus {
    /// Bytes read before the image was mounted: look-ups, indexes, and what the kernel
    /// asked for.
    pub mounted_bytes: u64,
    /// Milliseconds until it was mounted.
    pub mounted_ms: u64,
    /// Bytes of metadata read in the background since.
    pub metadata_bytes: u64,
    /// Milliseconds until all metadata had been read; none as long as some is missing.
    pub metadata_ms: Option<u64>,
}

/// One holder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HolderStatus {
    /// A mount's directory, or `attach` and the manifest's digest.
    pub holder: String,
    /// The image as it was asked for.
    pub image: String,
    /// Its manifest.
    pub manifest: Digest,
    /// Its layers, lowest first.
    pub layers: Vec<Root>,
    /// None until it is mounted, and for what an earlier daemon exported.
    #[serde(default)]
    pub ready: Option<ReadyStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Whatever comes over the socket, it is a command or it is not.
        #[test]
        fn nonsense_is_no_panic(
            line in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            which in 0usize..7,
            at in 0usize..200,
            byte: u8,
        ) {
            let _ = serde_json::from_slice::<Command>(&line);
            let _ = serde_json::from_slice::<Reply<Status>>(&line);
            let digest = "sha256:".to_owned() + &"0".repeat(64);
            let root = "7".repeat(64);
            let mut real = [
                r#"{"op":"attach","image":"x","holder":null}"#.to_owned(),
                format!(r#"{{"op":"attach_layer","diff_id":"{digest}","chain_id":"{digest}","root":"{root}","size":4096,"holder":"x"}}"#),
                format!(r#"{{"op":"attach_canary","digest":"{digest}","root":"{root}","size":4096,"holder":"x"}}"#),
                r#"{"op":"detach","holder":{"mount":"/x"}}"#.to_owned(),
                format!(r#"{{"op":"serve","root":"{root}"}}"#),
                r#"{"op":"orphans","remove":[1,2]}"#.to_owned(),
                r#"{"op":"upgrade","program":"/x"}"#.to_owned(),
            ]
            .map(String::into_bytes);
            for line in &real {
                assert!(serde_json::from_slice::<Command>(line).is_ok());
            }
            if let Some(place) = real[which].get_mut(at) {
                *place = byte;
            }
            let _ = serde_json::from_slice::<Command>(&real[which]);
        }
    }
}
