//! The canary as this node has it: exported by `ublk-server`, and read.
//!
//! Every read goes all the way to UFS and is verified on its way like those of containers
//! ([`accel_ufs::canary`]); what comes is compared here once more. It passes the kernel's
//! cache by.
//!
//! What a check waits for may hang for long: [`NodeCanary::check`] belongs on a thread that nobody
//! waits for.

use crate::ufs_place::UfsPlace;
use accel_client::exports::{alone, device, release_within};
use accel_client::paths::Paths;
use accel_client::protocol::{Command, Holder, LayerAnswer};
use accel_client::wire;
use accel_ufs::canary::{Canary, READ, READS};
use accel_ufs::node::NodeName;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Who holds the canary.
pub const HOLDER: &str = "accel-agent canary";
/// How long others may be at work.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the daemon may take to export it. Pulls and containers that come or go wait
/// meanwhile. What it exports afterwards goes with the next canary.
const EXPORT: Duration = Duration::from_secs(3);

/// Where canaries come from and go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The shared file system.
    pub ufs: UfsPlace,
    /// Whose canary it is.
    pub node: NodeName,
    /// The admin socket of `ublk-server`.
    pub server: PathBuf,
}

/// A node's canary. There is none until the first check.
#[derive(Debug, Default)]
pub struct NodeCanary {
    /// Where it is, or would be.
    places: Option<Places>,
    exported: Option<Exported>,
}

/// A canary that is exported.
#[derive(Debug)]
struct Exported {
    canary: Canary,
    device: PathBuf,
    /// How often it was read.
    reads: u64,
}

impl NodeCanary {
    /// Reads what nobody has read yet.
    ///
    /// # Errors
    /// Why the node cannot serve.
    pub fn check(&mut self, places: Places) -> Result<()> {
        if let Some(last) = self.places.take_if(|last| *last != places) {
            // Who served it may be gone for good.
            if let Err(error) = last.clear() {
                tracing::warn!(error = format!("{error:#}"), "a canary stays");
            }
            self.exported = None;
        }
        let checked = self.read(&places);
        self.places = Some(places);
        if checked.is_err() {
            // The next one begins from nothing: devices do not last for ever.
            self.exported = None;
        }
        checked
    }

    fn read(&mut self, places: &Places) -> Result<()> {
        // Told at once and in words: a read of files that are gone waits for them.
        places.ufs.open()?;
        self.exported.take_if(|one| one.reads == READS);
        let exported = match &mut self.exported {
            Some(exported) => exported,
            none => {
                places.clear()?;
                none.insert(places.export()?)
            }
        };
        let number = exported.reads;
        exported.reads += 1;
        let found = read_direct(&exported.device, Canary::offset(number))
            .with_context(|| format!("cannot read the canary {}", exported.device.display()))?;
        ensure!(
            found == exported.canary.content(number),
            "the canary {} gives wrong bytes",
            exported.device.display()
        );
        Ok(())
    }
}

impl Places {
    fn server(&self) -> Paths {
        Paths::new(&self.server, None)
    }

    /// Puts a canary on UFS, and has it exported.
    fn export(&self) -> Result<Exported> {
        let canary = self.ufs.open()?.put_canary(&self.node)?;
        let server = self.server();
        let command = Command::AttachCanary {
            digest: canary.digest,
            root: canary.root,
            size: canary.size,
            holder: HOLDER.to_owned(),
        };
        let device = alone(&server, PATIENCE, || {
            match wire::ask_within(&server.socket, &command, EXPORT)? {
                LayerAnswer::Attached(attached) => device(&server, &attached),
                LayerAnswer::Absent => bail!(
                    "ublk-server does not find the canary: does it read the UFS {}?",
                    self.ufs.path.display()
                ),
                LayerAnswer::OtherRoot(_) => bail!("ublk-server finds another canary"),
                LayerAnswer::Unreadable(why) => bail!("ublk-server cannot read the canary: {why}"),
            }
        })?;
        Ok(Exported {
            canary,
            device,
            reads: 0,
        })
    }

    /// Ends what there is of an earlier canary, of this process or another.
    ///
    /// # Errors
    /// `ublk-server` or UFS does not do it.
    pub fn clear(&self) -> Result<()> {
        let server = self.server();
        alone(&server, PATIENCE, || {
            release_within(&server, Holder::Layer(HOLDER.to_owned()), PATIENCE)
        })?;
        self.ufs.open()?.remove_canary(&self.node)?;
        Ok(())
    }
}

/// Reads past the kernel's cache.
fn read_direct(device: &Path, offset: u64) -> Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(device)?;
    // Where it goes has to lie as blocks do.
    let mut buffer = vec![0; 2 * READ];
    let start = buffer.as_ptr().align_offset(READ);
    let buffer = &mut buffer[start..start + READ];
    file.read_exact_at(buffer, offset)?;
    Ok(buffer.to_vec())
}
