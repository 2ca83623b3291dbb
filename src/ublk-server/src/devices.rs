//! The transport of this daemon, behind one interface.

use crate::engine::ExportReader;
use crate::keeper::Keeper;
use crate::orphans;
use crate::paths::Paths;
use crate::protocol::DeviceView;
use accel_transport::fuse::{FuseId, FuseOptions, FuseTransport};
use accel_transport::ublk::{Removal, UblkDevice, UblkOptions, UblkSpec, UblkTransport};
use accel_transport::{Choice, Transport, Wanted};
use accel_ufs::index::Root;
use anyhow::{Context as _, Result, bail};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

/// How long a device that looks busy is asked again: udev opens devices that
/// were just unmounted.
const BUSY: Duration = Duration::from_secs(5);

/// The transport that was chosen.
pub struct Devices {
    kind: Kind,
    /// Why this one.
    pub reason: String,
    /// What block devices are marked with.
    mark: u64,
}

enum Kind {
    Ublk(UblkTransport<ExportReader>),
    Fuse {
        transport: FuseTransport<ExportReader>,
        /// Layers whose files are mounted and served.
        served: Mutex<HashMap<Root, FuseId>>,
        /// Has their connections when this daemon is gone.
        keeper: Keeper,
    },
}

/// An exported layer, as its transport knows it.
#[derive(Debug, Clone)]
pub enum Device {
    /// A block device.
    Ublk(UblkDevice),
    /// A file on FUSE; it is served when a client has mounted it.
    Fuse,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Devices({}: {})", self.name(), self.reason)
    }
}

impl Devices {
    /// Starts the transport that is wanted, or the best one that works here. Over ublk,
    /// threads look for requests for at most `poll` before they sleep. Without
    /// `recovery`, block devices end with the daemon: for a test.
    pub fn start(wanted: Wanted, paths: &Paths, poll: Duration, recovery: bool) -> Result<Self> {
        let Choice { transport, reason } = accel_transport::choose(wanted)?;
        let mark = orphans::mark(&paths.run);
        let kind = match transport {
            Transport::Ublk => Kind::Ublk(UblkTransport::start(UblkOptions {
                poll,
                recovery,
                mark,
                ..UblkOptions::default()
            })?),
            Transport::Fuse => Kind::Fuse {
                transport: FuseTransport::start(&FuseOptions::default())?,
                served: Mutex::default(),
                keeper: Keeper::new(paths.keeper()),
            },
        };
        Ok(Self { kind, reason, mark })
    }

    /// What block devices of this daemon are marked with.
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// `ublk` or `fuse`.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Ublk(_) => "ublk",
            Kind::Fuse { .. } => "fuse",
        }
    }

    /// Exports a layer. `prepare` notes a block device before it is live.
    pub fn add(
        &self,
        reader: &Arc<ExportReader>,
        prepare: impl FnOnce(&UblkDevice) -> io::Result<()>,
    ) -> Result<Device> {
        match &self.kind {
            Kind::Ublk(transport) => {
                let device = transport.add(&UblkSpec::default(), Arc::clone(reader), prepare)?;
                Ok(Device::Ublk(device))
            }
            Kind::Fuse { .. } => Ok(Device::Fuse),
        }
    }

    /// Finishes what is under way as far as it can be in `bound`, and takes nothing
    /// more: for a successor. Nothing is served after this.
    pub fn hand_over(&self, bound: Duration) {
        match &self.kind {
            Kind::Ublk(transport) => {
                let quiesced = transport.hand_over(bound);
                tracing::info!(quiesced, "devices are handed over");
            }
            Kind::Fuse { transport, .. } => {
                if !transport.hand_over(bound) {
                    tracing::warn!(
                        "reads are under way; before Linux 6.9 those are never answered"
                    );
                }
            }
        }
    }

    /// What an earlier daemon served over FUSE and the keeper still has.
    pub fn kept(&self) -> HashMap<Root, OwnedFd> {
        let Kind::Fuse { keeper, .. } = &self.kind else {
            return HashMap::new();
        };
        keeper.take_over().unwrap_or_else(|error| {
            tracing::error!(
                error = format!("{error:#}"),
                "cannot take over the exports of an earlier daemon"
            );
            HashMap::new()
        })
    }

    /// Serves a connection that the keeper had, and its readers go on.
    pub fn adopt(&self, root: Root, fd: OwnedFd, reader: &Arc<ExportReader>) -> Result<()> {
        let Kind::Fuse {
            transport, served, ..
        } = &self.kind
        else {
            bail!("this daemon serves block devices, not FUSE files");
        };
        let id = transport.adopt(fd, Arc::clone(reader))?;
        lock(served).insert(root, id);
        Ok(())
    }

    /// Closes a connection that the keeper had and that nobody serves.
    pub fn forget(&self, root: Root) {
        if let Kind::Fuse { keeper, .. } = &self.kind {
            keeper.release(root);
        }
    }

    /// The process that keeps connections.
    pub fn keeper(&self) -> Option<i32> {
        match &self.kind {
            Kind::Fuse { keeper, .. } => keeper.pid(),
            Kind::Ublk(_) => None,
        }
    }

    /// The block-device transport, if it is that.
    pub fn ublk(&self) -> Option<&UblkTransport<ExportReader>> {
        match &self.kind {
            Kind::Ublk(transport) => Some(transport),
            Kind::Fuse { .. } => None,
        }
    }

    /// Ends an export; a block device that is to be unused is waited for a little.
    pub fn remove(&self, root: Root, device: &Device, when: Removal) -> Result<()> {
        match (&self.kind, device) {
            (Kind::Ublk(transport), Device::Ublk(device)) => {
                let since = Instant::now();
                loop {
                    match transport.remove(device.id, when) {
                        Ok(()) => return Ok(()),
                        // Somebody else has removed it: that is what was wanted.
                        Err(_) if matches!(transport.state(device.id), Ok(None)) => {
                            return Ok(());
                        }
                        Err(error) if since.elapsed() > BUSY => {
                            return Err(error).context("the device is still in use");
                        }
                        Err(_) => thread::sleep(Duration::from_millis(20)),
                    }
                }
            }
            (
                Kind::Fuse {
                    transport,
                    served,
                    keeper,
                },
                Device::Fuse,
            ) => {
                let id = lock(served).remove(&root);
                let removed = id.map_or(Ok(()), |id| transport.remove(id));
                keeper.release(root);
                Ok(removed?)
            }
            _ => bail!("the device belongs to another transport"),
        }
    }

    /// Serves a layer on a FUSE file system that a client has mounted.
    pub fn serve_fuse(&self, root: Root, fd: OwnedFd, reader: &Arc<ExportReader>) -> Result<()> {
        let Kind::Fuse {
            transport,
            served,
            keeper,
        } = &self.kind
        else {
            bail!("this daemon serves block devices, not FUSE files");
        };
        // Before anybody relies on it.
        keeper
            .keep(root, &fd)
            .context("cannot have the connection kept beyond this daemon")?;
        let id = transport.add(fd, Arc::clone(reader))?;
        if let Some(old) = lock(served).insert(root, id) {
            // Its file was unmounted behind our back.
            transport.remove(old)?;
        }
        Ok(())
    }

    /// How a client reaches a device.
    pub fn view(&self, root: Root, device: &Device) -> DeviceView {
        match (&self.kind, device) {
            (_, Device::Ublk(device)) => DeviceView::Ublk {
                path: device.path.clone(),
            },
            (
                Kind::Fuse {
                    transport, served, ..
                },
                Device::Fuse,
            ) => {
                let id = lock(served).get(&root).copied();
                let connected = id.is_some_and(|id| transport.is_connected(id).unwrap_or(false));
                DeviceView::Fuse { served: connected }
            }
            (Kind::Ublk(_), Device::Fuse) => DeviceView::Fuse { served: false },
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
