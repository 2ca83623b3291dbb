//! The transport of this daemon, behind one interface.

use crate::engine::ExportReader;
use crate::protocol::DeviceView;
use accel_transport::ublk::{Removal, UblkDevice, UblkOptions, UblkSpec, UblkTransport};
use accel_ufs::index::Root;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

/// How long a device that looks busy is asked again: udev opens devices that
/// were just unmounted.
const BUSY: Duration = Duration::from_secs(5);

/// Which transport to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// ublk where the kernel has it, else fuse.
    Auto,
    /// Block devices by the kernel's ublk driver.
    Ublk,
    /// Files on FUSE.
    Fuse,
}

/// The transport that was chosen.
pub struct Devices {
    kind: Kind,
    /// Why this one.
    pub reason: String,
}

enum Kind {
    Ublk(UblkTransport<ExportReader>),
    Fuse(Mutex<HashMap<Root, Session>>),
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
    /// Probes the kernel and starts the transport.
    pub fn start(choice: Choice) -> Result<Self> {
        let fuse = |reason| Self {
            kind: Kind::Fuse(Mutex::default()),
            reason,
        };
        if choice == Choice::Fuse {
            return Ok(fuse("asked for with --transport fuse".to_owned()));
        }
        match UblkTransport::start(UblkOptions::default()) {
            Ok(transport) => {
                let features = transport.features();
                let reason = format!("this kernel's driver offers {features}");
                let kind = Kind::Ublk(transport);
                Ok(Self { kind, reason })
            }
            Err(error) if choice == Choice::Auto => {
                Ok(fuse(format!("ublk cannot be used: {error}")))
            }
            Err(error) => Err(error).context("--transport ublk was asked for"),
        }
    }

    /// `ublk` or `fuse`.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Ublk(_) => "ublk",
            Kind::Fuse(_) => "fuse",
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
            Kind::Fuse(_) => Ok(Device::Fuse),
        }
    }

    /// The block-device transport, if it is that.
    pub fn ublk(&self) -> Option<&UblkTransport<ExportReader>> {
        match &self.kind {
            Kind::Ublk(transport) => Some(transport),
            Kind::Fuse(_) => None,
        }
    }

    /// Ends an export that nobody uses any more.
    pub fn remove(&self, root: Root, device: &Device) -> Result<()> {
        match (&self.kind, device) {
            (Kind::Ublk(transport), Device::Ublk(device)) => {
                let since = Instant::now();
                loop {
                    match transport.remove(device.id, Removal::IfUnused) {
                        Ok(()) => return Ok(()),
                        Err(error) if since.elapsed() > BUSY => {
                            return Err(error).context("the device is still in use");
                        }
                        Err(_) => thread::sleep(Duration::from_millis(20)),
                    }
                }
            }
            (Kind::Fuse(sessions), Device::Fuse) => {
                drop(lock(sessions).remove(&root));
                Ok(())
            }
            _ => bail!("the device belongs to another transport"),
        }
    }

    /// Serves a layer on a FUSE file system that a client has mounted.
    pub fn serve_fuse(&self, root: Root, fd: OwnedFd, reader: &Arc<ExportReader>) -> Result<()> {
        let Kind::Fuse(sessions) = &self.kind else {
            bail!("this daemon serves block devices, not FUSE files");
        };
        let session = Session::start(root, fd, reader)?;
        lock(sessions).insert(root, session);
        Ok(())
    }

    /// How a client reaches a device.
    pub fn view(&self, root: Root, device: &Device) -> DeviceView {
        match (&self.kind, device) {
            (_, Device::Ublk(device)) => DeviceView::Ublk {
                path: device.path.clone(),
            },
            (Kind::Fuse(sessions), Device::Fuse) => {
                let sessions = lock(sessions);
                let session = sessions.get(&root);
                DeviceView::Fuse {
                    served: session.is_some_and(Session::is_running),
                    failure: None,
                }
            }
            (Kind::Ublk(_), Device::Fuse) => DeviceView::Fuse {
                served: false,
                failure: None,
            },
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A FUSE connection that is served.
struct Session {}

impl Session {
    fn start(_root: Root, _fd: OwnedFd, _reader: &Arc<ExportReader>) -> Result<Self> {
        bail!("the fuse transport is not built in yet")
    }

    fn is_running(&self) -> bool {
        false
    }
}
