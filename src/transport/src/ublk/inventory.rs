//! The ublk devices of this machine, whoever made them.
//!
//! For those who look after devices without serving any: a daemon that died, or
//! that never came to note what it had made, leaves some behind.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;

use super::control::Control;
use super::error::{UblkError, Unavailable};
use super::{Removal, abandoned, open_exclusive, probe};
use accel_sys::ublk::{ControlOp, DeviceInfo, DeviceState, Features};

/// Where the driver lists its devices, started or not.
const CLASS: &str = "/sys/class/ublk-char";

/// Looks at all devices, and removes such that nobody serves.
#[derive(Debug)]
pub struct Inventory {
    control: Control,
    features: Features,
    bound: Duration,
    async_deletion: bool,
}

impl Inventory {
    /// Opens the driver's control device. Each command may take as long as `bound`.
    pub fn open(bound: Duration) -> Result<Self, Unavailable> {
        let control = Control::open()?;
        let features = probe::usable(&control)?;
        Ok(Self {
            control,
            features,
            bound,
            async_deletion: true,
        })
    }

    /// Deletes as where the driver lacks DEL_DEV_ASYNC (before Linux 6.9): for a test.
    #[must_use]
    pub fn without_async_deletion(mut self) -> Self {
        self.async_deletion = false;
        self
    }

    /// All devices, by id.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, UblkError> {
        let ids = ids(Path::new(CLASS)).map_err(|source| UblkError::Node {
            device: u32::MAX,
            action: "listing",
            path: CLASS.to_owned(),
            source,
        })?;
        let mut devices = Vec::with_capacity(ids.len());
        for id in ids {
            // One that has just gone is none.
            devices.extend(self.control.info(id, self.bound)?);
        }
        Ok(devices)
    }

    /// Stops and deletes a device that no process serves. With [`Removal::Always`]
    /// who waits for it gets I/O errors.
    pub fn remove(&self, id: u32, when: Removal) -> Result<(), UblkError> {
        let info = abandoned(&self.control, id, self.bound, DeviceInfo::is_served)?;
        let mut stop = ControlOp::StopDev;
        let mut _exclusive = None;
        if when == Removal::IfUnused && info.state != DeviceState::Stopped {
            if self.features.contains(Features::SAFE_STOP_DEV) {
                stop = ControlOp::TryStopDev;
            } else {
                _exclusive = Some(open_exclusive(id)?);
            }
        }
        match self.control.plain(stop, id, self.bound) {
            Ok(()) => {}
            Err(UblkError::Control {
                errno: Errno::BUSY, ..
            }) => return Err(UblkError::InUse { device: id }),
            Err(error) => return Err(error),
        }
        drop(_exclusive);
        // A stopped one may be mounted all the same, for ever.
        if when == Removal::IfUnused && info.state != DeviceState::Stopped {
            return self.control.plain(ControlOp::DelDev, id, self.bound);
        }
        match self.async_deletion {
            true => self.control.delete(id, self.bound),
            false => self.control.delete_giving_up(id),
        }
    }
}

fn ids(class: &Path) -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir(class) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
        ids.extend(id.and_then(|id| id.parse::<u32>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_from_names() {
        let class = tempfile::tempdir().unwrap();
        for name in ["ublkc10", "ublkc2", "ublkcx", "other"] {
            fs::write(class.path().join(name), "").unwrap();
        }
        assert_eq!(ids(class.path()).unwrap(), [2, 10]);
        assert_eq!(ids(&class.path().join("none")).unwrap(), [] as [u32; 0]);
    }
}
