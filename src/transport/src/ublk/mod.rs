//! Block devices through the kernel's ublk driver.
//!
//! ```text
//!  add, remove, recover ──► control thread ──► /dev/ublk-control
//!
//!  /dev/ublkbN ◄─ driver ─► /dev/ublkcN ◄─► queue thread ──► Reader
//!                              ▲                  ▲            │
//!                              └── pwrite ────────┼── fill ────┤
//!                                                 └── finish ──┘  from any thread
//! ```
//!
//! Every device has one queue, is read-only, and outlives its daemon: whatever
//! ends this process without [`UblkTransport::remove`] leaves the device to
//! [`UblkTransport::recover`], and those who read it wait until then. Depth,
//! request size and flags are fixed when a device is added, so `recover` takes
//! them from the driver.
//!
//! Features asked for: `USER_COPY` (a cached byte is copied once, into the
//! request's pages), `USER_RECOVERY` with `USER_RECOVERY_REISSUE` (reads that
//! were under way when the daemon died are sent to the next one instead of
//! failing), `CMD_IOCTL_ENCODE`, and, where there are such, `NO_AUTO_PART_SCAN` and
//! `QUIESCE` (devices can be handed over in order).

mod control;
mod error;
mod helpers;
mod inventory;
mod mailbox;
mod pace;
mod place;
mod probe;
mod queue;
mod unfinished;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::io::Errno;

pub use accel_sys::ublk::{DeviceInfo, DeviceState, Features};
pub use error::{OpName, UblkError, Unavailable};
pub use inventory::Inventory;
pub use pace::Polls;
pub use probe::probe;
pub use queue::UblkRequest;

use crate::request::Reader;
use accel_sys::ublk::{ControlOp, Geometry, MAX_DEVICE_ID, NewDevice, Payload};
use control::{Control, Pending};
use helpers::Helpers;
use pace::Polling;
use queue::{Queue, Served, Task};

/// Threads that copy large requests beside the queue threads, where there are so many
/// processors.
const MOST_HELPERS: usize = 2;

/// How a [`UblkTransport`] works.
#[derive(Debug, Clone)]
pub struct UblkOptions {
    /// Threads that serve queues; each serves many devices.
    pub queue_threads: usize,
    /// How long a queue thread looks for the next request before it sleeps, at most and
    /// while requests follow each other closely; zero: it does not. All threads together
    /// look on at most half of the processors that the process may use.
    pub poll: Duration,
    /// How long a control command may take, and a device file to appear.
    pub control_timeout: Duration,
    /// How long [`remove`](UblkTransport::remove) waits for reads under way.
    pub drain_timeout: Duration,
    /// How long [`recover`](UblkTransport::recover) waits for the driver to let
    /// go of the dead daemon.
    pub recovery_timeout: Duration,
    /// Whether devices outlive their daemon. Without, its death is an I/O error for
    /// all who read them: for the test that has to see that.
    pub recovery: bool,
    /// What new devices are marked with, so that [`Inventory`] knows whose they
    /// are. The driver keeps it and makes nothing of it.
    pub mark: u64,
}

impl Default for UblkOptions {
    fn default() -> Self {
        UblkOptions {
            queue_threads: 2,
            poll: Duration::from_micros(200),
            control_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
            recovery_timeout: Duration::from_secs(60),
            recovery: true,
            mark: 0,
        }
    }
}

/// A device to be added.
#[derive(Debug, Clone)]
pub struct UblkSpec {
    /// `N` of `/dev/ublkbN`; the driver chooses if there is none.
    pub id: Option<u32>,
    /// Requests under way at once.
    pub queue_depth: u16,
    /// Largest request in bytes. The kernel's default of 128 segments limits a
    /// request of scattered pages to 512 KiB anyway.
    pub max_io_bytes: u32,
}

impl Default for UblkSpec {
    fn default() -> Self {
        UblkSpec {
            id: None,
            queue_depth: 64,
            max_io_bytes: 512 << 10,
        }
    }
}

/// A device as it was added or recovered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UblkDevice {
    /// `N` of `/dev/ublkbN`.
    pub id: u32,
    /// The block device.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// Flags, fixed for its life.
    pub features: Features,
    /// Requests under way at once, fixed for its life.
    pub queue_depth: u16,
    /// Largest request in bytes, fixed for its life.
    pub max_io_bytes: u32,
}

impl UblkDevice {
    fn new(info: &DeviceInfo, size: u64) -> Self {
        UblkDevice {
            id: info.id,
            path: block_path(info.id),
            size,
            features: info.features,
            queue_depth: info.queue_depth,
            max_io_bytes: info.max_io_bytes,
        }
    }
}

/// When to remove a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Only if nobody has it open or mounted.
    IfUnused,
    /// In any case; who still uses it gets I/O errors.
    Always,
}

/// Serves ublk devices. Dropping it leaves its devices to be recovered.
pub struct UblkTransport<R> {
    // The queues end before the control thread, which is the order of fields, and before
    // the helpers: what they have begun is finished.
    queues: Vec<Queue<R>>,
    _helpers: Helpers<Task<R>>,
    polling: Polling,
    devices: Mutex<HashMap<u32, Arc<Served>>>,
    control: Control,
    features: Features,
    options: UblkOptions,
}

impl<R> fmt::Debug for UblkTransport<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UblkTransport")
            .field("features", &self.features)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

impl<R: Reader> UblkTransport<R> {
    /// Starts the threads, if the driver is there and good enough.
    pub fn start(options: UblkOptions) -> Result<Self, UblkError> {
        let control = Control::open()?;
        let features = probe::usable(&control)?;
        // Cgroups that give less than one count as one.
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let polling = Polling::new(options.poll, processors);
        let helpers = Helpers::start((processors - 1).min(MOST_HELPERS))
            .map_err(|source| Unavailable::Ring { source })?;
        let queues = (0..options.queue_threads.max(1))
            .map(|index| Queue::start(index, &polling, helpers.pile()))
            .collect::<Result<_, _>>()?;
        Ok(UblkTransport {
            queues,
            _helpers: helpers,
            polling,
            devices: Mutex::default(),
            control,
            features,
            options,
        })
    }

    /// What the driver can do.
    pub fn features(&self) -> Features {
        self.features
    }

    /// How often queue threads have looked for requests before they slept.
    pub fn polls(&self) -> Polls {
        self.polling.allowance.polls()
    }

    /// Flags that a new device will be asked to have.
    pub fn device_features(&self) -> Features {
        let (required, wanted) = match self.options.recovery {
            true => (
                Features::REQUIRED,
                Features::NO_AUTO_PART_SCAN.union(Features::QUIESCE),
            ),
            // What cannot be recovered cannot be quiesced.
            false => (
                Features::REQUIRED
                    .without(Features::USER_RECOVERY.union(Features::USER_RECOVERY_REISSUE)),
                Features::NO_AUTO_PART_SCAN,
            ),
        };
        required.union(self.features.intersection(wanted))
    }

    /// Adds a device and waits until its file is there.
    ///
    /// `prepare` runs when the device has its id and parameters but is not yet
    /// live: a journal can note it before anyone could depend on it. If
    /// `prepare` fails the device is deleted again.
    pub fn add(
        &self,
        spec: &UblkSpec,
        reader: Arc<R>,
        prepare: impl FnOnce(&UblkDevice) -> io::Result<()>,
    ) -> Result<UblkDevice, UblkError> {
        let bound = self.options.control_timeout;
        let size = reader.size();
        check(spec, size)?;
        let info = self.control.add(
            &NewDevice {
                id: spec.id,
                features: self.device_features(),
                queue_depth: spec.queue_depth,
                max_io_bytes: spec.max_io_bytes,
                mark: self.options.mark,
            },
            bound,
        )?;
        let id = info.id;
        let mut served = None;
        let started = (|| {
            let geometry = Geometry {
                size,
                max_io_bytes: info.max_io_bytes,
            };
            self.control.set_geometry(id, &geometry, bound)?;
            let device = UblkDevice::new(&info, size);
            prepare(&device).map_err(|source| UblkError::Prepare { device: id, source })?;
            let serving = served.insert(self.attach(&info, reader)?);
            self.go_live(ControlOp::StartDev, serving)?;
            Ok(device)
        })();
        match (started, served) {
            (Ok(device), Some(served)) => {
                self.devices().insert(id, served);
                Ok(device)
            }
            (started, served) => {
                if let Err(error) = self.stop_and_delete(id, served, ControlOp::StopDev) {
                    tracing::warn!(device = id, %error, "cannot delete a ublk device that did not start");
                }
                started
            }
        }
    }

    /// Takes over a device whose daemon died, and lets its I/O go on.
    ///
    /// Waits for the driver to let go of the dead daemon. The reader must serve
    /// the same bytes as before; at least its size is compared. May be tried again
    /// after an error, with an equal reader.
    pub fn recover(&self, id: u32, reader: Arc<R>) -> Result<UblkDevice, UblkError> {
        let attached = self.devices().get(&id).map(Arc::clone);
        if let Some(served) = attached {
            // An earlier attempt got as far as having the tags.
            return match self.control.info(id, self.options.control_timeout)? {
                Some(info) if info.state == DeviceState::Quiesced => {
                    self.go_live(ControlOp::EndUserRecovery, &served)?;
                    Ok(UblkDevice::new(&info, reader.size()))
                }
                _ => Err(unsuitable(id, "it is served by this process already")),
            };
        }
        let (info, size) = self.begin_recovery(id, reader.size())?;
        let served = self.attach(&info, reader)?;
        // From here on the tags are with the driver and come back only when
        // the device stops: even after an error it counts as ours.
        self.devices().insert(id, Arc::clone(&served));
        self.go_live(ControlOp::EndUserRecovery, &served)?;
        Ok(UblkDevice::new(&info, size))
    }

    /// Checks the device and sends START_USER_RECOVERY until it succeeds.
    fn begin_recovery(&self, id: u32, wanted: u64) -> Result<(DeviceInfo, u64), UblkError> {
        let bound = self.options.control_timeout;
        let since = Instant::now();
        loop {
            let Some(info) = self.control.info(id, bound)? else {
                return Err(unsuitable(id, "there is no such device"));
            };
            if !info.features.contains(Features::REQUIRED) || info.queues != 1 {
                let (queues, features) = (info.queues, info.features);
                return Err(unsuitable(
                    id,
                    format!("it is not one of ours ({queues} queues, {features})"),
                ));
            }
            let not_recoverable = || UblkError::NotRecoverable {
                device: id,
                state: info.state,
                waited: since.elapsed(),
            };
            match info.state {
                DeviceState::Live | DeviceState::Quiesced | DeviceState::FailingIo => {}
                DeviceState::Stopped | DeviceState::Other(_) => return Err(not_recoverable()),
            }
            let size = self.control.geometry(id, bound)?.size;
            if size != wanted {
                return Err(unsuitable(
                    id,
                    format!("it has {size} bytes, the image to serve on it {wanted}"),
                ));
            }
            match self.control.plain(ControlOp::StartUserRecovery, id, bound) {
                Ok(()) => return Ok((info, size)),
                // A successor before us got this far and died.
                Err(UblkError::Control {
                    errno: Errno::INVAL,
                    ..
                }) if info.state == DeviceState::Quiesced
                    && since.elapsed() < self.options.recovery_timeout =>
                {
                    let path = char_path(id);
                    match unfinished::complete(&path, info.queue_depth) {
                        Err(error) if error.raw_os_error() != Some(Errno::BUSY.raw_os_error()) => {
                            return Err(UblkError::Node {
                                device: id,
                                action: "completing an unfinished recovery by",
                                path: path.display().to_string(),
                                source: error,
                            });
                        }
                        _ => thread::sleep(Duration::from_millis(5)),
                    }
                }
                Err(UblkError::Control {
                    errno: Errno::BUSY, ..
                }) if since.elapsed() < self.options.recovery_timeout => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(UblkError::Control {
                    errno: Errno::BUSY, ..
                }) => return Err(not_recoverable()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes a device: one that is served here, or one that a dead daemon
    /// left. Bounded in time; may be tried again after an error.
    pub fn remove(&self, id: u32, when: Removal) -> Result<(), UblkError> {
        let bound = self.options.control_timeout;
        let served = self.devices().get(&id).map(Arc::clone);
        let info = match &served {
            Some(_) => self.control.info(id, bound)?,
            // This process does not, whatever it was before it became this program.
            None => Some(abandoned(&self.control, id, bound, |info| {
                info.is_served() && info.daemon.cast_unsigned() != std::process::id()
            })?),
        };
        let Some(info) = info else {
            self.devices().remove(&id);
            return Err(unsuitable(id, "there is no such device"));
        };
        let mut stop = ControlOp::StopDev;
        // Nobody may mount it between the test and the stop.
        let mut _exclusive = None;
        if when == Removal::IfUnused && info.state != DeviceState::Stopped {
            if self.features.contains(Features::SAFE_STOP_DEV) {
                stop = ControlOp::TryStopDev;
            } else {
                _exclusive = Some(open_exclusive(id)?);
            }
        }
        self.stop(id, served.as_deref(), stop)?;
        drop(_exclusive);
        self.devices().remove(&id);
        drop(served);
        self.delete(id, when)
    }

    /// What the driver knows of a device; `None` if there is none of this id.
    pub fn state(&self, id: u32) -> Result<Option<DeviceInfo>, UblkError> {
        self.control.info(id, self.options.control_timeout)
    }

    /// Prepares all devices for another process to recover: where the driver can
    /// (Linux 6.16), new requests wait from here on, and what is under way is
    /// finished, if it takes some milliseconds; all of it within about `bound`. Gives
    /// the number of devices that were prepared; the others lose nothing either, as
    /// what they have under way is sent again. In any case this process must end now,
    /// or become another program: no device goes on being served.
    pub fn hand_over(&self, bound: Duration) -> usize {
        /// Commands under way at once.
        const TOGETHER: usize = 16;
        /// How long what is under way may take to be finished: it is sent again otherwise,
        /// which costs its readers less than to wait for all of it. Linux 7.3 gives a tag
        /// back that was idle, and not one whose request is answered after that.
        const UNDER_WAY: Duration = Duration::from_millis(20);
        let until = Instant::now() + bound;
        let left = || until.saturating_duration_since(Instant::now());
        let served: Vec<_> = self.devices().values().map(Arc::clone).collect();
        if !self.features.contains(Features::QUIESCE) {
            return 0;
        }
        let mut quiesced = Vec::new();
        for some in served.chunks(TOGETHER) {
            if left().is_zero() {
                break;
            }
            let quiesce = |served: &Arc<Served>| {
                // Milliseconds; zero would be for ever.
                let limit = left().as_millis().clamp(1, 1000) as u64;
                self.control
                    .start(ControlOp::QuiesceDev, served.id, limit, Payload::none())
            };
            let pending: Vec<_> = some.iter().map(quiesce).collect();
            for (pending, served) in pending.into_iter().zip(some) {
                match pending.wait(left() + Duration::from_millis(100)) {
                    Ok(_) => quiesced.push(served),
                    // Made by a version that did not ask for it, or too busy.
                    Err(error) => tracing::debug!(%error, "a ublk device is left as it is"),
                }
            }
        }
        let until = until.min(Instant::now() + UNDER_WAY);
        for served in &quiesced {
            let _ = served.wait_detached(until.saturating_duration_since(Instant::now()));
        }
        quiesced.len()
    }

    fn devices(&self) -> MutexGuard<'_, HashMap<u32, Arc<Served>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the character device and gives it to the least busy queue thread.
    fn attach(&self, info: &DeviceInfo, reader: Arc<R>) -> Result<Arc<Served>, UblkError> {
        let path = char_path(info.id);
        let node = |action, source| UblkError::Node {
            device: info.id,
            action,
            path: path.display().to_string(),
            source,
        };
        let cdev = wait_for(self.options.control_timeout, || {
            File::options().read(true).write(true).open(&path)
        })
        .map_err(|source| node("opening", source))?;
        let queue = self
            .queues
            .iter()
            .min_by_key(|queue| queue.devices())
            .ok_or(UblkError::Ended {
                what: "queue thread",
            })?;
        queue
            .attach(info.id, OwnedFd::from(cdev), info.queue_depth, reader)
            .map_err(|source| node("mapping the descriptors of", source))
    }

    /// Sends START_DEV or END_USER_RECOVERY, which wait until the driver has
    /// all tags, and then waits for the block device's file.
    fn go_live(&self, op: ControlOp, served: &Served) -> Result<(), UblkError> {
        let id = served.id;
        let since = Instant::now();
        let daemon = u64::from(std::process::id());
        let pending = self.control.start(op, id, daemon, Payload::none());
        self.outlast(pending, served, self.options.control_timeout)?;
        let path = block_path(id);
        let left = self.options.control_timeout.saturating_sub(since.elapsed());
        wait_for(left, || {
            if fs::metadata(&path)?.file_type().is_block_device() {
                Ok(())
            } else {
                Err(io::Error::from(io::ErrorKind::NotFound))
            }
        })
        .map_err(|source| UblkError::Node {
            device: id,
            action: "waiting for",
            path: path.display().to_string(),
            source,
        })
    }

    /// Waits for a command that depends on the queue thread.
    fn outlast(
        &self,
        pending: Pending<'_>,
        served: &Served,
        bound: Duration,
    ) -> Result<(), UblkError> {
        let since = Instant::now();
        loop {
            if let Some(answer) = pending.poll(Duration::from_millis(50)) {
                return answer.map(drop);
            }
            if let Some(error) = served.failure() {
                let _ = pending.give_up();
                return Err(error);
            }
            if since.elapsed() >= bound {
                return pending.give_up().map(drop);
            }
        }
    }

    /// Stops a device and waits until its queue thread has forgotten it.
    fn stop(&self, id: u32, served: Option<&Served>, op: ControlOp) -> Result<(), UblkError> {
        match self.control.plain(op, id, self.options.drain_timeout) {
            Ok(()) => {}
            Err(UblkError::Control {
                errno: Errno::BUSY, ..
            }) => return Err(UblkError::InUse { device: id }),
            Err(error) => return Err(error),
        }
        match served {
            Some(served) => served
                .wait_detached(self.options.drain_timeout)
                .map_err(|held| UblkError::Held { device: id, held }),
            None => Ok(()),
        }
    }

    /// Deletes a stopped device, which goes when its character device and everybody's
    /// files and mounts of it are closed. That is waited for unless somebody may use it.
    fn delete(&self, id: u32, when: Removal) -> Result<(), UblkError> {
        let bound = self.options.control_timeout;
        match when {
            Removal::IfUnused => self.control.plain(ControlOp::DelDev, id, bound),
            Removal::Always => self.control.delete(id, bound),
        }
    }

    fn stop_and_delete(
        &self,
        id: u32,
        served: Option<Arc<Served>>,
        op: ControlOp,
    ) -> Result<(), UblkError> {
        self.stop(id, served.as_deref(), op)?;
        drop(served);
        self.delete(id, Removal::IfUnused)
    }
}

/// The device, when the driver has seen that nobody serves it; an error if somebody
/// `serves` it, or the driver does not see it in time.
fn abandoned(
    control: &Control,
    id: u32,
    bound: Duration,
    serves: impl Fn(&DeviceInfo) -> bool,
) -> Result<DeviceInfo, UblkError> {
    let since = Instant::now();
    loop {
        let Some(info) = control.info(id, bound)? else {
            return Err(unsuitable(id, "there is no such device"));
        };
        if info.state != DeviceState::Live {
            return Ok(info);
        }
        if serves(&info) || since.elapsed() > bound {
            return Err(unsuitable(id, format!("process {} serves it", info.daemon)));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn unsuitable(device: u32, problem: impl Into<String>) -> UblkError {
    UblkError::Unsuitable {
        device,
        problem: problem.into(),
    }
}

fn check(spec: &UblkSpec, size: u64) -> Result<(), UblkError> {
    if size == 0 || !size.is_multiple_of(4096) {
        return Err(UblkError::Spec(format!(
            "an export has a multiple of 4096 bytes, not {size}"
        )));
    }
    if spec.queue_depth == 0 || spec.queue_depth > 4096 {
        return Err(UblkError::Spec(format!(
            "queue depth {} is not between 1 and 4096",
            spec.queue_depth
        )));
    }
    if spec.max_io_bytes < 4096
        || spec.max_io_bytes > 1 << 20
        || !spec.max_io_bytes.is_multiple_of(4096)
    {
        return Err(UblkError::Spec(format!(
            "a largest request of {} bytes is not a multiple of 4096 up to 1 MiB",
            spec.max_io_bytes
        )));
    }
    if spec.id.is_some_and(|id| id >= MAX_DEVICE_ID) {
        return Err(UblkError::Spec(format!("ids are below {}", MAX_DEVICE_ID)));
    }
    Ok(())
}

/// Opens a block device so that nobody else can mount it.
fn open_exclusive(id: u32) -> Result<File, UblkError> {
    let path = block_path(id);
    let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(&path);
    file.map_err(|source| {
        if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) {
            UblkError::InUse { device: id }
        } else {
            UblkError::Node {
                device: id,
                action: "opening",
                path: path.display().to_string(),
                source,
            }
        }
    })
}

/// Tries again while a file is not there yet, or udev has not set its mode.
fn wait_for<T>(bound: Duration, mut action: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + bound;
    loop {
        match action() {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) && Instant::now() < until =>
            {
                thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

/// Where the sysfs files of a device are, for those who tune or watch it.
pub fn sysfs(id: u32) -> PathBuf {
    Path::new("/sys/block").join(format!("ublkb{id}"))
}
