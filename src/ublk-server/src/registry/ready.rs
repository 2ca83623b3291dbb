//! How much of UFS, and how long, it took until an image was ready.

use crate::engine::Export;
use crate::protocol::ReadyStatus;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// From the request for an image until all of its metadata is in memory.
#[derive(Debug)]
pub(super) struct Readiness {
    began: Instant,
    /// Bytes read to find the image.
    looked_up: u64,
    layers: Vec<Layer>,
    mounted: OnceLock<(u64, Duration)>,
}

#[derive(Debug)]
struct Layer {
    export: Arc<Export>,
    /// What was read of it before, for others: all of it, and in the background.
    before: (u64, u64),
}

impl Readiness {
    /// An image that was asked for at `began`, found by reading `looked_up` bytes.
    pub(super) fn new(began: Instant, looked_up: u64) -> Self {
        Self {
            began,
            looked_up,
            layers: Vec::new(),
            mounted: OnceLock::new(),
        }
    }

    /// Adds a layer; `new` if it is exported for this image.
    pub(super) fn add(&mut self, export: &Arc<Export>, new: bool) {
        let counters = &export.counters;
        let before = match new {
            true => (0, 0),
            false => (counters.source_bytes.load(Relaxed), export.metadata_bytes()),
        };
        let export = Arc::clone(export);
        self.layers.push(Layer { export, before });
    }

    /// The image is mounted.
    pub(super) fn mounted(&self) {
        let read = self.layers.iter().map(|layer| {
            let now = layer.export.counters.source_bytes.load(Relaxed);
            now.saturating_sub(layer.before.0)
        });
        let bytes = self.looked_up + read.sum::<u64>();
        let _ = self.mounted.set((bytes, self.began.elapsed()));
    }

    /// `None` until the image is mounted.
    pub(super) fn status(&self) -> Option<ReadyStatus> {
        let (mounted_bytes, mounted) = *self.mounted.get()?;
        let metadata_bytes = self.layers.iter().map(|layer| {
            let now = layer.export.metadata_bytes();
            now.saturating_sub(layer.before.1)
        });
        let complete = self.layers.iter().map(|layer| layer.export.complete());
        // The last of them counts; one that is not complete makes all not complete.
        let complete = complete.collect::<Option<Vec<_>>>();
        let complete = complete.map(|all| all.into_iter().max().unwrap_or(self.began));
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Some(ReadyStatus {
            mounted_bytes,
            mounted_ms: milliseconds(mounted),
            metadata_bytes: metadata_bytes.sum(),
            metadata_ms: complete.map(|at| {
                let took = at.saturating_duration_since(self.began);
                milliseconds(took.max(mounted))
            }),
        })
    }
}
