//! What metrics say of exports. Nothing here waits for a transport or a source.

use super::Registry;
use crate::devices::Device;
use crate::engine::Totals;
use std::sync::atomic::Ordering::Relaxed;

/// What one export has done.
#[derive(Debug)]
pub struct Counted {
    /// What the layer is called on UFS.
    pub layer: String,
    /// `/dev/ublkbN`, or `fuse`.
    pub device: String,
    /// What it has done.
    pub totals: Totals,
}

impl Registry {
    /// What every export has done, by name of the layer.
    pub fn counted(&self) -> Vec<Counted> {
        let mut all: Vec<_> = {
            let state = self.state();
            let counted = state.exports.values().map(|served| Counted {
                layer: served.export.name.to_string(),
                device: match &served.device {
                    Device::Ublk(device) => device.path.display().to_string(),
                    Device::Fuse => "fuse".to_owned(),
                },
                totals: served.export.counters.totals(),
            });
            counted.collect()
        };
        all.sort_by(|a, b| a.layer.cmp(&b.layer));
        all
    }

    /// Number of mounts and other users of images.
    pub fn holders(&self) -> usize {
        self.state().holders.len()
    }

    /// Exports that were taken over from an earlier daemon, and how many could not be
    /// yet.
    pub fn recoveries(&self) -> (u64, usize) {
        (self.recovered.load(Relaxed), self.unrecovered().len())
    }
}
