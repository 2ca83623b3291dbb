//! What can go wrong with ublk, and what to do about it.

use std::time::Duration;
use std::{fmt, io};

use rustix::io::Errno;

use accel_sys::ublk::{ControlOp, DeviceState, Features};

/// Why this machine cannot serve ublk devices.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// No control device.
    #[error(
        "no /dev/ublk-control: load the driver with `modprobe ublk_drv` (in Linux since 6.0; Debian's kernels have it from 6.12 on)"
    )]
    NoDriver,
    /// The control device is there, but not for us.
    #[error("/dev/ublk-control may not be opened: run as root with CAP_SYS_ADMIN")]
    NotPermitted,
    /// The control device does not open.
    #[error("opening /dev/ublk-control: {source}")]
    Control {
        /// The kernel's answer.
        source: io::Error,
    },
    /// io_uring is not to be had.
    #[error("setting up io_uring: {source} (needs Linux 6.1 and kernel.io_uring_disabled=0)")]
    Ring {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The driver does not answer as it should.
    #[error("asking the ublk driver for its features: {0}")]
    Probe(#[source] Box<UblkError>),
    /// The driver is too old.
    #[error("the ublk driver lacks {missing}: Linux 6.5 or newer is needed")]
    Lacks {
        /// What it lacks.
        missing: Features,
    },
}

/// Name of a control command, for messages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OpName(ControlOp);

impl From<ControlOp> for OpName {
    fn from(op: ControlOp) -> Self {
        OpName(op)
    }
}

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why something could not be done to a ublk device.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// Not on this machine.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The driver refused a control command.
    #[error("ublk device {}: {op}: {errno}{}", DeviceName(*.device), hint(*.op, *.errno))]
    Control {
        /// The command.
        op: OpName,
        /// The device's id.
        device: u32,
        /// The driver's answer.
        errno: Errno,
    },
    /// A control command did not come back in time.
    #[error(
        "ublk device {}: {op} did not finish in {} s{}", DeviceName(*.device), .waited.as_secs(),
        if *.interrupted { ", interrupted" } else { " and cannot be interrupted; see the kernel log" }
    )]
    Timeout {
        /// The command.
        op: OpName,
        /// The device's id.
        device: u32,
        /// How long it was waited for.
        waited: Duration,
        /// Whether the kernel gave it up.
        interrupted: bool,
    },
    /// The driver refused a tag.
    #[error("ublk device {device}: the driver refused an I/O command: {errno}")]
    Queue {
        /// The device's id.
        device: u32,
        /// The driver's answer.
        errno: Errno,
    },
    /// A device file did not appear or does not open.
    #[error("ublk device {device}: {action} {path}: {source}")]
    Node {
        /// The device's id.
        device: u32,
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The caller's step between adding and starting failed.
    #[error("ublk device {device}: preparing to start it: {source}")]
    Prepare {
        /// The device's id.
        device: u32,
        /// The caller's error.
        source: io::Error,
    },
    /// Tags did not come back.
    #[error("ublk device {device}: stopped, but {held} requests are still held by their reader")]
    Held {
        /// The device's id.
        device: u32,
        /// How many.
        held: u16,
    },
    /// Somebody has it open.
    #[error("ublk device {device} is in use: unmount what is on /dev/ublkb{device} first")]
    InUse {
        /// The device's id.
        device: u32,
    },
    /// There is no such device, or it is not ours.
    #[error("ublk device {device}: {problem}")]
    Unsuitable {
        /// The device's id.
        device: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// Not in a state to be recovered.
    #[error("ublk device {device} cannot be recovered: it is {state:?} after {} s", .waited.as_secs())]
    NotRecoverable {
        /// The device's id.
        device: u32,
        /// Its state.
        state: DeviceState,
        /// How long it was waited for.
        waited: Duration,
    },
    /// What was asked for makes no sense.
    #[error("ublk device: {0}")]
    Spec(String),
    /// A thread of ours is gone.
    #[error("the ublk {what} has ended; restart the daemon, its devices will be recovered")]
    Ended {
        /// Which thread.
        what: &'static str,
    },
}

struct DeviceName(u32);

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == u32::MAX {
            f.write_str("(new)")
        } else {
            self.0.fmt(f)
        }
    }
}

fn hint(op: OpName, errno: Errno) -> &'static str {
    match (op.0, errno) {
        (ControlOp::AddDev, Errno::EXIST) => " (the id is taken)",
        (ControlOp::AddDev, Errno::ACCESS | Errno::NOSPC) => {
            " (too many ublk devices: load ublk_drv with a larger ublks_max)"
        }
        (_, Errno::NODEV) => " (there is no such device)",
        (_, Errno::PERM | Errno::ACCESS) => " (CAP_SYS_ADMIN is needed)",
        _ => "",
    }
}
