//! The ublk driver's user interface: the only module that names `libublk`.
//!
//! Two kinds of command travel as io_uring commands. *Control commands* go to
//! `/dev/ublk-control` and carry a 32-byte header plus a buffer. *I/O commands*
//! go to a device's `/dev/ublkcN`, one per tag: FETCH_REQ hands a tag to the
//! driver, which completes the command when a request takes the tag;
//! COMMIT_AND_FETCH_REQ answers the request and hands the tag back.
//!
//! What a request asks for stands in an array of descriptors, one per tag, that
//! the driver shares through `mmap` of the character device. With `USER_COPY`
//! its data moves by `pwrite` to the same file, at an offset that encodes queue
//! and tag.

use std::fmt;
use std::path::Path;

use libublk::sys;

/// Result of an I/O command whose tag the driver takes back for good.
pub const IO_RES_ABORT: i32 = sys::UBLK_IO_RES_ABORT;

/// Size of the descriptor of one tag.
pub(super) const DESCRIPTOR_SIZE: usize = size_of::<sys::ublksrv_io_desc>();

/// The first dev_id that the driver refuses: ids are minor numbers.
pub const MAX_DEVICE_ID: u32 = 1 << 20;

/// Bits of `GET_FEATURES` and of a device's flags.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:ident;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Features = Features(sys::$bit as u64);)*

            const NAMES: &'static [(Features, &'static str)] =
                &[$((Features::$name, stringify!($name))),*];
        }
    };
}

features! {
    /// A device outlives its daemon.
    USER_RECOVERY = UBLK_F_USER_RECOVERY;
    /// What the dead daemon had in hand is sent again to the next one.
    USER_RECOVERY_REISSUE = UBLK_F_USER_RECOVERY_REISSUE;
    /// Devices of ordinary users.
    UNPRIVILEGED_DEV = UBLK_F_UNPRIVILEGED_DEV;
    /// Commands are numbered as ioctls.
    CMD_IOCTL_ENCODE = UBLK_F_CMD_IOCTL_ENCODE;
    /// Data is copied by `pwrite` to the character device.
    USER_COPY = UBLK_F_USER_COPY;
    /// A device without daemon answers with errors instead of waiting.
    USER_RECOVERY_FAIL_IO = UBLK_F_USER_RECOVERY_FAIL_IO;
    /// The size of a live device may change.
    UPDATE_SIZE = UBLK_F_UPDATE_SIZE;
    /// A live device can be handed over in an orderly way.
    QUIESCE = UBLK_F_QUIESCE;
    /// Any thread may own a tag.
    PER_IO_DAEMON = UBLK_F_PER_IO_DAEMON;
    /// Many commits in one command.
    BATCH_IO = UBLK_F_BATCH_IO;
    /// A device that is open can be left alone when stopping.
    SAFE_STOP_DEV = UBLK_F_SAFE_STOP_DEV;
    /// No partition scan when a device starts.
    NO_AUTO_PART_SCAN = UBLK_F_NO_AUTO_PART_SCAN;
}

impl Features {
    /// What every device of ours has.
    pub const REQUIRED: Features = Features(
        Self::USER_RECOVERY.0
            | Self::USER_RECOVERY_REISSUE.0
            | Self::CMD_IOCTL_ENCODE.0
            | Self::USER_COPY.0,
    );

    /// Bits as the driver has them.
    pub fn from_bits(bits: u64) -> Self {
        Features(bits)
    }

    /// The bits as the driver has them.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` is there.
    pub fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub fn union(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// What is in `self` but not in `other`.
    #[must_use]
    pub fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut first = true;
        for &(bit, name) in Self::NAMES {
            if self.contains(bit) {
                rest = rest.without(bit);
                write!(f, "{}{name}", if first { "" } else { " | " })?;
                first = false;
            }
        }
        if rest.0 != 0 || first {
            write!(f, "{}{:#x}", if first { "" } else { " | " }, rest.0)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

/// What a device is doing, as the driver tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Added but not started, or stopped.
    Stopped,
    /// Served by the process `daemon`.
    Live,
    /// Its daemon died; I/O waits for the next one.
    Quiesced,
    /// Its daemon died; I/O fails.
    FailingIo,
    /// A state that this version does not know.
    Other(u16),
}

/// A device as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `N` of `/dev/ublkbN`.
    pub id: u32,
    /// What it is doing.
    pub state: DeviceState,
    /// Process id of the daemon that started it, as seen from here.
    pub daemon: i32,
    /// Flags it was added with.
    pub features: Features,
    /// Number of hardware queues.
    pub queues: u16,
    /// Tags of each queue.
    pub queue_depth: u16,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
    /// What its maker marked it with; means nothing to the driver.
    pub mark: u64,
}

impl DeviceInfo {
    /// Whether a process serves it. The driver may not have seen yet that one is gone.
    pub fn is_served(&self) -> bool {
        self.state == DeviceState::Live && Path::new(&format!("/proc/{}", self.daemon)).exists()
    }
}

/// What `ADD_DEV` and `SET_PARAMS` need.
#[derive(Debug, Clone, Copy)]
pub struct NewDevice {
    /// `None`: the driver chooses.
    pub id: Option<u32>,
    /// Flags.
    pub features: Features,
    /// Tags of its one queue.
    pub queue_depth: u16,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
    /// See [`DeviceInfo::mark`].
    pub mark: u64,
}

/// Geometry of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// In bytes.
    pub size: u64,
    /// Largest request in bytes.
    pub max_io_bytes: u32,
}

/// Log2 of the logical block size. Images consist of 4 KiB blocks, EROFS never
/// asks for less, and every request being a whole number of them leaves no
/// unaligned case to any layer below.
const BLOCK_SHIFT: u8 = 12;
/// Log2 of the optimal request: a chunk. The kernel reads ahead twice of it.
const OPTIMAL_SHIFT: u8 = 17;

/// A control command; displayed as the driver's header names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlOp {
    GetFeatures,
    GetDevInfo,
    AddDev,
    SetParams,
    GetParams,
    StartDev,
    StopDev,
    TryStopDev,
    DelDev,
    DelDevAsync,
    StartUserRecovery,
    EndUserRecovery,
    QuiesceDev,
}

impl ControlOp {
    fn number(self) -> u32 {
        match self {
            Self::GetFeatures => sys::UBLK_U_CMD_GET_FEATURES,
            Self::GetDevInfo => sys::UBLK_U_CMD_GET_DEV_INFO,
            Self::AddDev => sys::UBLK_U_CMD_ADD_DEV,
            Self::SetParams => sys::UBLK_U_CMD_SET_PARAMS,
            Self::GetParams => sys::UBLK_U_CMD_GET_PARAMS,
            Self::StartDev => sys::UBLK_U_CMD_START_DEV,
            Self::StopDev => sys::UBLK_U_CMD_STOP_DEV,
            Self::TryStopDev => sys::UBLK_U_CMD_TRY_STOP_DEV,
            Self::DelDev => sys::UBLK_U_CMD_DEL_DEV,
            Self::DelDevAsync => sys::UBLK_U_CMD_DEL_DEV_ASYNC,
            Self::StartUserRecovery => sys::UBLK_U_CMD_START_USER_RECOVERY,
            Self::EndUserRecovery => sys::UBLK_U_CMD_END_USER_RECOVERY,
            Self::QuiesceDev => sys::UBLK_U_CMD_QUIESCE_DEV,
        }
    }
}

impl fmt::Display for ControlOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::GetDevInfo => "GET_DEV_INFO",
            Self::AddDev => "ADD_DEV",
            Self::SetParams => "SET_PARAMS",
            Self::GetParams => "GET_PARAMS",
            Self::StartDev => "START_DEV",
            Self::StopDev => "STOP_DEV",
            Self::TryStopDev => "TRY_STOP_DEV",
            Self::DelDev => "DEL_DEV",
            Self::DelDevAsync => "DEL_DEV_ASYNC",
            Self::StartUserRecovery => "START_USER_RECOVERY",
            Self::EndUserRecovery => "END_USER_RECOVERY",
            Self::QuiesceDev => "QUIESCE_DEV",
        })
    }
}

/// The buffer of a control command. On the heap, so that the driver may write
/// to it for as long as the command is under way wherever its owner moves.
pub struct Payload(Buffer);

enum Buffer {
    None,
    Features(Box<u64>),
    Device(Box<sys::ublksrv_ctrl_dev_info>),
    Params(Box<sys::ublk_params>),
}

impl Payload {
    /// For commands without a buffer.
    pub fn none() -> Self {
        Payload(Buffer::None)
    }

    /// For `GET_FEATURES`.
    pub fn features() -> Self {
        Payload(Buffer::Features(Box::new(0)))
    }

    /// For `GET_DEV_INFO`.
    pub fn device() -> Self {
        Payload(Buffer::Device(Box::default()))
    }

    /// For `ADD_DEV`.
    pub fn new_device(new: &NewDevice) -> Self {
        Payload(Buffer::Device(Box::new(sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: 1,
            queue_depth: new.queue_depth,
            max_io_buf_bytes: new.max_io_bytes,
            dev_id: new.id.unwrap_or(u32::MAX),
            flags: new.features.bits(),
            ublksrv_flags: new.mark,
            ..Default::default()
        })))
    }

    /// For `GET_PARAMS`.
    pub fn params() -> Self {
        Payload(Buffer::Params(Box::new(sys::ublk_params {
            len: u32_size::<sys::ublk_params>(),
            types: sys::UBLK_PARAM_TYPE_BASIC,
            ..Default::default()
        })))
    }

    /// For `SET_PARAMS`: read-only, without a volatile cache.
    pub fn new_params(geometry: &Geometry) -> Self {
        Payload(Buffer::Params(Box::new(sys::ublk_params {
            len: u32_size::<sys::ublk_params>(),
            types: sys::UBLK_PARAM_TYPE_BASIC,
            basic: sys::ublk_param_basic {
                attrs: sys::UBLK_ATTR_READ_ONLY,
                logical_bs_shift: BLOCK_SHIFT,
                physical_bs_shift: BLOCK_SHIFT,
                io_opt_shift: OPTIMAL_SHIFT,
                io_min_shift: BLOCK_SHIFT,
                max_sectors: geometry.max_io_bytes >> 9,
                dev_sectors: geometry.size >> 9,
                ..Default::default()
            },
            ..Default::default()
        })))
    }

    /// The feature bits that came back.
    pub fn as_features(&self) -> Option<Features> {
        match &self.0 {
            Buffer::Features(bits) => Some(Features(**bits)),
            _ => None,
        }
    }

    /// The device that came back.
    pub fn as_device(&self) -> Option<DeviceInfo> {
        let Buffer::Device(info) = &self.0 else {
            return None;
        };
        let state = match u32::from(info.state) {
            sys::UBLK_S_DEV_DEAD => DeviceState::Stopped,
            sys::UBLK_S_DEV_LIVE => DeviceState::Live,
            sys::UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => DeviceState::FailingIo,
            _ => DeviceState::Other(info.state),
        };
        Some(DeviceInfo {
            id: info.dev_id,
            state,
            daemon: info.ublksrv_pid,
            features: Features(info.flags),
            queues: info.nr_hw_queues,
            queue_depth: info.queue_depth,
            max_io_bytes: info.max_io_buf_bytes,
            mark: info.ublksrv_flags,
        })
    }

    /// The geometry that came back.
    pub fn as_geometry(&self) -> Option<Geometry> {
        let Buffer::Params(params) = &self.0 else {
            return None;
        };
        Some(Geometry {
            size: params.basic.dev_sectors << 9,
            max_io_bytes: params.basic.max_sectors << 9,
        })
    }

    /// Whether the driver reads or writes no more than this with `op`.
    pub(super) fn is_for(&self, op: ControlOp) -> bool {
        use ControlOp as Op;
        match op {
            Op::GetFeatures => matches!(self.0, Buffer::Features(_)),
            Op::GetDevInfo | Op::AddDev => matches!(self.0, Buffer::Device(_)),
            Op::SetParams | Op::GetParams => matches!(self.0, Buffer::Params(_)),
            Op::StartDev
            | Op::StopDev
            | Op::TryStopDev
            | Op::DelDev
            | Op::DelDevAsync
            | Op::StartUserRecovery
            | Op::EndUserRecovery
            | Op::QuiesceDev => true,
        }
    }

    /// Address and length for the command's header.
    fn location(&mut self) -> (u64, u16) {
        match &mut self.0 {
            Buffer::None => (0, 0),
            Buffer::Features(bits) => (address(&raw mut **bits), u16_size::<u64>()),
            Buffer::Device(info) => (
                address(&raw mut **info),
                u16_size::<sys::ublksrv_ctrl_dev_info>(),
            ),
            Buffer::Params(params) => (address(&raw mut **params), u16_size::<sys::ublk_params>()),
        }
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Buffer::None => "None",
            Buffer::Features(_) => "Features",
            Buffer::Device(_) => "Device",
            Buffer::Params(_) => "Params",
        })
    }
}

fn address<T>(pointer: *mut T) -> u64 {
    pointer.expose_provenance() as u64
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the driver's structures are small"
)]
const fn u16_size<T>() -> u16 {
    size_of::<T>() as u16
}

fn u32_size<T>() -> u32 {
    u32::from(u16_size::<T>())
}

/// Number and 80-byte body of a control command, `ublksrv_ctrl_cmd` first.
pub(super) fn control_command(
    op: ControlOp,
    device: u32,
    data: u64,
    payload: &mut Payload,
) -> (u32, [u8; 80]) {
    let (addr, len) = payload.location();
    let mut body = [0; 80];
    body[0..4].copy_from_slice(&device.to_ne_bytes());
    body[4..6].copy_from_slice(&u16::MAX.to_ne_bytes()); // no queue
    body[6..8].copy_from_slice(&len.to_ne_bytes());
    body[8..16].copy_from_slice(&addr.to_ne_bytes());
    body[16..24].copy_from_slice(&data.to_ne_bytes());
    (op.number(), body)
}

/// Number and 16-byte body (`ublksrv_io_cmd`) of an I/O command on queue 0.
pub(super) fn io_command(commit: Option<i32>, tag: u16) -> (u32, [u8; 16]) {
    let number = match commit {
        None => sys::UBLK_U_IO_FETCH_REQ,
        Some(_) => sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ,
    };
    let mut body = [0; 16];
    body[2..4].copy_from_slice(&tag.to_ne_bytes());
    body[4..8].copy_from_slice(&commit.unwrap_or(0).to_ne_bytes());
    (number, body)
}

/// Where the data of a request on queue 0 begins in the character device.
pub fn data_offset(tag: u16) -> u64 {
    u64::from(sys::UBLKSRV_IO_BUF_OFFSET) + (u64::from(tag) << sys::UBLK_TAG_OFF)
}

/// A raw descriptor, as shared memory holds it.
pub(super) type RawDescriptor = sys::ublksrv_io_desc;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Bytes of the device.
    Read {
        /// The first one.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Nothing to do for a device that nobody writes.
    Flush,
    /// Anything that would change the device.
    Write,
    /// DISCARD, WRITE_ZEROES, zones, or something newer.
    Other(u8),
}

impl Ask {
    pub(super) fn from_raw(raw: RawDescriptor) -> Self {
        let op = raw.op_flags.to_ne_bytes();
        let op = if cfg!(target_endian = "little") {
            op[0]
        } else {
            op[3]
        };
        match u32::from(op) {
            sys::UBLK_IO_OP_READ => Ask::Read {
                offset: raw.start_sector.saturating_mul(512),
                len: u64::from(raw.nr_sectors) * 512,
            },
            sys::UBLK_IO_OP_FLUSH => Ask::Flush,
            sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_OP_WRITE_SAME => Ask::Write,
            _ => Ask::Other(op),
        }
    }
}
