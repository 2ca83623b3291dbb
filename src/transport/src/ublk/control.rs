//! Control commands, each bounded in time.
//!
//! One thread owns `/dev/ublk-control` and a ring; callers send it commands and
//! wait for the answer as long as they like. A command that takes longer than
//! its bound is interrupted, and if even that does not help it is left behind:
//! its buffer stays with the control thread, its caller gets an error. Some
//! kernels are known to hang in ADD_DEV for ever.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::io::Errno;

use super::error::{UblkError, Unavailable};
use accel_sys::ublk::{ControlEvent, ControlRing, Wake};
use accel_sys::ublk::{ControlOp, DeviceInfo, Features, Geometry, NewDevice, Payload};

/// The driver's control device.
pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// How long a command that was interrupted may take to come back.
const GRACE: Duration = Duration::from_secs(1);

struct Command {
    op: ControlOp,
    device: u32,
    data: u64,
    payload: Payload,
    number: u64,
    answer: SyncSender<Answer>,
}

struct Answer {
    result: i32,
    payload: Payload,
}

enum Order {
    Run(Command),
    Interrupt(u64),
    Stop,
}

/// The control thread, seen from the others.
#[derive(Debug)]
pub(super) struct Control {
    orders: Sender<Order>,
    wake: Arc<Wake>,
    numbers: std::sync::atomic::AtomicU64,
    /// Hangs up when the thread has closed its files.
    ended: Mutex<Receiver<()>>,
}

/// A command under way.
pub(super) struct Pending<'a> {
    control: &'a Control,
    op: ControlOp,
    device: u32,
    number: u64,
    answer: Receiver<Answer>,
    since: Instant,
}

impl Control {
    /// Opens the control device.
    pub fn open() -> Result<Self, Unavailable> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(CONTROL_PATH)
            .map_err(
                |error| match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::NOENT) => Unavailable::NoDriver,
                    Some(Errno::NODEV | Errno::NXIO) => Unavailable::NoDriver,
                    Some(Errno::ACCESS | Errno::PERM) => Unavailable::NotPermitted,
                    _ => Unavailable::Control { source: error },
                },
            )?;
        let wake = Arc::new(Wake::new().map_err(|source| Unavailable::Ring { source })?);
        let (orders, inbox) = mpsc::channel();
        let (ready, started) = mpsc::sync_channel(1);
        let thread_wake = Arc::clone(&wake);
        let (running, ended) = mpsc::sync_channel::<()>(1);
        thread::Builder::new()
            .name("ublk-control".into())
            .spawn(move || {
                match ControlRing::new(&thread_wake) {
                    Ok(ring) => {
                        let _ = ready.send(Ok(()));
                        run(&file, ring, &thread_wake, &inbox);
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
                drop(file);
                drop(running);
            })
            .map_err(|source| Unavailable::Ring { source })?;
        match started.recv() {
            Ok(Ok(())) => Ok(Control {
                orders,
                wake,
                numbers: std::sync::atomic::AtomicU64::new(0),
                ended: Mutex::new(ended),
            }),
            Ok(Err(source)) => Err(Unavailable::Ring { source }),
            Err(_) => Err(Unavailable::Ring {
                source: io::Error::other("the control thread ended"),
            }),
        }
    }

    fn order(&self, order: Order) {
        // If the thread is gone, whoever waits for the answer sees it.
        let _ = self.orders.send(order);
        self.wake.wake();
    }

    /// Starts a command.
    pub fn start(&self, op: ControlOp, device: u32, data: u64, payload: Payload) -> Pending<'_> {
        let (answer, receiver) = mpsc::sync_channel(1);
        let number = self
            .numbers
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.order(Order::Run(Command {
            op,
            device,
            data,
            payload,
            number,
            answer,
        }));
        Pending {
            control: self,
            op,
            device,
            number,
            answer: receiver,
            since: Instant::now(),
        }
    }

    /// The bits the driver has.
    pub fn features(&self, bound: Duration) -> Result<Features, UblkError> {
        let pending = self.start(ControlOp::GetFeatures, u32::MAX, 0, Payload::features());
        let payload = pending.wait(bound)?;
        Ok(payload.as_features().unwrap_or(Features::from_bits(0)))
    }

    /// What the driver knows of a device; `None` if it has none of this id.
    pub fn info(&self, device: u32, bound: Duration) -> Result<Option<DeviceInfo>, UblkError> {
        let pending = self.start(ControlOp::GetDevInfo, device, 0, Payload::device());
        match pending.wait(bound) {
            Ok(payload) => Ok(payload.as_device()),
            Err(UblkError::Control {
                errno: Errno::NODEV,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds a device; the driver may have changed depth and size of requests.
    pub fn add(&self, new: &NewDevice, bound: Duration) -> Result<DeviceInfo, UblkError> {
        let id = new.id.unwrap_or(u32::MAX);
        let pending = self.start(ControlOp::AddDev, id, 0, Payload::new_device(new));
        let payload = pending.wait(bound)?;
        payload.as_device().ok_or(UblkError::Control {
            op: ControlOp::AddDev.into(),
            device: id,
            errno: Errno::IO,
        })
    }

    pub fn geometry(&self, device: u32, bound: Duration) -> Result<Geometry, UblkError> {
        let pending = self.start(ControlOp::GetParams, device, 0, Payload::params());
        let payload = pending.wait(bound)?;
        payload.as_geometry().ok_or(UblkError::Control {
            op: ControlOp::GetParams.into(),
            device,
            errno: Errno::IO,
        })
    }

    pub fn set_geometry(
        &self,
        device: u32,
        geometry: &Geometry,
        bound: Duration,
    ) -> Result<(), UblkError> {
        let payload = Payload::new_params(geometry);
        self.start(ControlOp::SetParams, device, 0, payload)
            .wait(bound)?;
        Ok(())
    }

    /// A command that carries neither buffer nor data.
    pub fn plain(&self, op: ControlOp, device: u32, bound: Duration) -> Result<(), UblkError> {
        self.start(op, device, 0, Payload::none()).wait(bound)?;
        Ok(())
    }

    /// Deletes a stopped device. Who still has it open or mounted, which may be for ever,
    /// is not waited for: the driver frees it with its last user.
    pub fn delete(&self, device: u32, bound: Duration) -> Result<(), UblkError> {
        match self.plain(ControlOp::DelDevAsync, device, bound) {
            Err(UblkError::Control { errno, .. }) if is_unknown(errno) => {}
            result => return result,
        }
        self.delete_giving_up(device)
    }

    /// The same where the driver lacks DEL_DEV_ASYNC (before Linux 6.9). The device is gone
    /// at once here, too, but the command waits for the last user; that can be given up.
    pub fn delete_giving_up(&self, device: u32) -> Result<(), UblkError> {
        const LAST_USER: Duration = Duration::from_secs(1);
        match self.plain(ControlOp::DelDev, device, LAST_USER) {
            Err(UblkError::Timeout {
                interrupted: true, ..
            }) => Ok(()),
            result => result,
        }
    }
}

/// The driver's answer to a command that it does not know; 524 is the kernel's own
/// ENOTSUPP, which was never meant to be seen.
fn is_unknown(errno: Errno) -> bool {
    [Errno::OPNOTSUPP, Errno::from_raw_os_error(524)].contains(&errno)
}

impl Drop for Control {
    fn drop(&mut self) {
        self.order(Order::Stop);
        // Not a join: a thread ends only after its commands have, and one that
        // hangs in the kernel would take the caller with it.
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = ended.recv_timeout(GRACE);
    }
}

impl Pending<'_> {
    /// Looks for the answer for at most `bound`. `None`: not yet.
    pub fn poll(&self, bound: Duration) -> Option<Result<Payload, UblkError>> {
        let answer = if bound.is_zero() {
            self.answer.try_recv().map_err(|error| match error {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        } else {
            self.answer.recv_timeout(bound)
        };
        let op = self.op.into();
        let device = self.device;
        match answer {
            Ok(answer) if answer.result >= 0 => Some(Ok(answer.payload)),
            Ok(answer) => Some(Err(UblkError::Control {
                op,
                device,
                errno: Errno::from_raw_os_error(-answer.result),
            })),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(UblkError::Ended {
                what: "control thread",
            })),
        }
    }

    /// Waits for the answer for at most `bound`, then gives up.
    pub fn wait(self, bound: Duration) -> Result<Payload, UblkError> {
        match self.poll(bound) {
            Some(answer) => answer,
            None => self.give_up(),
        }
    }

    /// Interrupts the command. Success if it succeeded after all.
    pub fn give_up(self) -> Result<Payload, UblkError> {
        self.control.order(Order::Interrupt(self.number));
        match self.poll(GRACE) {
            Some(Ok(payload)) => Ok(payload),
            answer => Err(UblkError::Timeout {
                op: self.op.into(),
                device: self.device,
                waited: self.since.elapsed(),
                interrupted: answer.is_some(),
            }),
        }
    }
}

/// The control thread.
fn run(file: &File, mut ring: ControlRing, wake: &Wake, inbox: &Receiver<Order>) {
    let mut under_way: HashMap<u64, (u64, SyncSender<Answer>)> = HashMap::new();
    let mut events = Vec::new();
    loop {
        loop {
            match inbox.try_recv() {
                Ok(Order::Run(command)) => {
                    let Command {
                        op,
                        device,
                        data,
                        payload,
                        number,
                        answer,
                    } = command;
                    match ring.start(file.as_fd(), op, device, data, payload) {
                        Ok(token) => {
                            under_way.insert(token, (number, answer));
                        }
                        Err(error) => {
                            let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
                            let _ = answer.try_send(Answer {
                                result: -errno,
                                payload: Payload::none(),
                            });
                        }
                    }
                }
                Ok(Order::Interrupt(number)) => {
                    let token = under_way
                        .iter()
                        .find_map(|(token, (other, _))| (*other == number).then_some(*token));
                    if let Some(token) = token
                        && let Err(error) = ring.cancel(token)
                    {
                        tracing::warn!(%error, "cannot interrupt a ublk control command");
                    }
                }
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => break,
            }
        }
        if let Err(error) = ring.wait(wake, &mut events) {
            tracing::error!(%error, "the ublk control thread cannot use its ring and ends");
            return;
        }
        for event in events.drain(..) {
            if let ControlEvent::Done {
                token,
                result,
                payload,
            } = event
                && let Some((_, answer)) = under_way.remove(&token)
            {
                // The caller may have given up.
                let _ = answer.try_send(Answer { result, payload });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_older_drivers_lack_is_told_from_one_that_failed() {
        assert!(is_unknown(Errno::OPNOTSUPP));
        assert!(is_unknown(Errno::from_raw_os_error(524)));
        for failed in [Errno::BUSY, Errno::NODEV, Errno::INTR, Errno::INVAL] {
            assert!(!is_unknown(failed), "{failed}");
        }
    }
}
