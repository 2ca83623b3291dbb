//! Devices of this daemon, or of an earlier one in its place, that no journal knows.
//!
//! Every device bears the mark of the run directory whose daemon made it, so that
//! two daemons on a machine, or other users of ublk, are not in each other's way.
//! Devices of versions that set no mark are known by the journal only.

use crate::protocol::Orphan;
use accel_oci::Digest;
use accel_transport::ublk::{DeviceInfo, DeviceState, Inventory, Removal};
use anyhow::Result;
use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

/// How long the driver may take for one command.
pub const BOUND: Duration = Duration::from_secs(10);

/// The upper half of a mark.
const OURS: u64 = u64::from_be_bytes(*b"ACCL\0\0\0\0");

/// The mark of the daemon with this run directory.
pub fn mark(run: &Path) -> u64 {
    let run = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    let hash = Digest::of(run.as_os_str().as_encoded_bytes()).hex();
    // It is all hexadecimal digits.
    OURS | u64::from(u32::from_str_radix(&hash[..8], 16).unwrap_or(0))
}

/// The devices with this mark that are not `known` and that no process serves.
pub fn find(inventory: &Inventory, mark: u64, known: &HashSet<u32>) -> Result<Vec<DeviceInfo>> {
    let devices = inventory.devices()?.into_iter();
    let ours = devices.filter(|info| info.mark == mark && !known.contains(&info.id));
    Ok(ours.filter(|info| !info.is_served()).collect())
}

/// Removes those of `found` for which `remove` holds and that are not mounted; gives
/// those that are left.
pub fn end(
    inventory: &Inventory,
    found: Vec<DeviceInfo>,
    remove: impl Fn(&DeviceInfo) -> bool,
) -> Vec<Orphan> {
    let mut left = Vec::new();
    for info in found {
        let kept = match remove(&info).then(|| inventory.remove(info.id, Removal::IfUnused)) {
            None => None,
            Some(Ok(())) => {
                tracing::info!(device = info.id, "removed a device that no journal knows");
                continue;
            }
            Some(Err(error)) => Some(error.to_string()),
        };
        left.push(Orphan {
            device: info.id,
            state: word(info.state).to_owned(),
            kept,
        });
    }
    left
}

fn word(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Stopped => "not started",
        DeviceState::Live => "its daemon died a moment ago",
        DeviceState::Quiesced => "without a daemon: who reads it waits",
        DeviceState::FailingIo => "without a daemon: reads fail",
        DeviceState::Other(_) => "in an unknown state",
    }
}
