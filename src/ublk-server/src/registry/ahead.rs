//! Layers that will be asked for soon.
//!
//! containerd asks for one layer of an image after the other, and each takes several
//! turns to UFS. So when the first is asked for, the image's record is read, and the
//! layers on top of it are opened in the background, many at a time. The record is only
//! a hint: what was opened serves if it is what is asked for then, with that name, root
//! and size.

use super::look_up::{catalog, open_layer};
use crate::catalog::{CatalogError, Layer};
use crate::engine::{Engine, Export};
use crate::threads::Threads;
use accel_oci::Digest;
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use accel_ufs::resolve::ImageName;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long what was opened counts.
const FRESH: Duration = Duration::from_secs(30);
/// How long an image is not looked at again: of layers that are not there, each asks.
const PAUSE: Duration = Duration::from_secs(1);
/// Images whose layers are opened at the same time, lest they take all memory.
const IMAGES: usize = 4;

/// What is opened ahead.
#[derive(Debug)]
pub(super) struct Ahead {
    engine: Arc<Engine>,
    ufs: PathBuf,
    threads: Arc<Threads>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// A layer was opened, or cannot be.
    opened: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Images that were looked at.
    images: HashMap<Digest, Instant>,
    /// Those whose layers are being opened.
    running: HashSet<Digest>,
    /// Layers that were asked for meanwhile.
    asked: HashSet<Root>,
    layers: HashMap<Root, (Instant, Progress)>,
}

#[derive(Debug)]
enum Progress {
    UnderWay,
    Open(Arc<Export>),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ahead {
    pub(super) fn new(engine: &Arc<Engine>, ufs: &Path, threads: &Arc<Threads>) -> Self {
        Self {
            engine: Arc::clone(engine),
            ufs: ufs.to_owned(),
            threads: Arc::clone(threads),
            shared: Arc::default(),
        }
    }

    /// Has the layers of `image` opened that are on top of `from`, but for those that are
    /// exported. Waits for nothing.
    pub(super) fn begin(&self, image: Digest, from: Root, exported: HashSet<Root>) {
        let mut state = self.shared.state();
        state.images.retain(|_, at| at.elapsed() < PAUSE);
        state.layers.retain(|_, (at, progress)| {
            at.elapsed() < FRESH || matches!(progress, Progress::UnderWay)
        });
        let known = exported.contains(&from) || state.layers.contains_key(&from);
        let looked_at = state.images.contains_key(&image) || state.running.contains(&image);
        if known || looked_at || state.running.len() >= IMAGES {
            return;
        }
        if state.running.is_empty() {
            state.asked.clear();
        }
        let (engine, ufs) = (Arc::clone(&self.engine), self.ufs.clone());
        let (threads, shared) = (Arc::clone(&self.threads), Arc::clone(&self.shared));
        let run = move || {
            let looked = look_ahead(&engine, &ufs, &threads, &shared, image, from, &exported);
            if let Err(error) = looked {
                tracing::debug!(%image, %error, "its layers are not looked up ahead");
            }
            let mut state = shared.state();
            state.running.remove(&image);
            state.images.insert(image, Instant::now());
        };
        match self.threads.run("ahead", run) {
            Ok(()) => {
                state.running.insert(image);
            }
            Err(error) => tracing::warn!(%error, "cannot look layers up ahead"),
        }
    }

    /// The layer with one of these names, this root and size, if it was opened ahead. If
    /// that is under way, waits for it. Else it is not opened ahead any more.
    pub(super) fn take(
        &self,
        names: [LayerName; 2],
        root: Root,
        size: ImageSize,
    ) -> Option<Arc<Export>> {
        let patience = self.engine.patience().lookup();
        let under_way =
            |state: &mut State| matches!(state.layers.get(&root), Some((_, Progress::UnderWay)));
        let mut state = self.shared.state();
        if !state.running.is_empty() {
            state.asked.insert(root);
        }
        let waited = self
            .shared
            .opened
            .wait_timeout_while(state, patience.attempt, under_way);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if under_way(&mut state) {
            return None;
        }
        match state.layers.remove(&root)? {
            (at, Progress::Open(export))
                if at.elapsed() < FRESH
                    && names.contains(&export.name)
                    && export.image_size() == size =>
            {
                Some(export)
            }
            _ => None,
        }
    }
}

fn look_ahead(
    engine: &Arc<Engine>,
    ufs: &Path,
    threads: &Threads,
    shared: &Arc<Shared>,
    image: Digest,
    from: Root,
    exported: &HashSet<Root>,
) -> Result<(), CatalogError> {
    // `from` is being opened already.
    let known = |root| root == from || exported.contains(&root);
    let found = catalog(engine, ufs).find(&ImageName::Manifest(image), known)?;
    let mut seen = exported.clone();
    let on_top = found
        .layers
        .into_iter()
        .skip_while(|layer| layer.root != from);
    let wanted: Vec<Layer> = on_top
        .skip(1)
        .filter(|layer| seen.insert(layer.root))
        .collect();
    let (engine, shared) = (Arc::clone(engine), Arc::clone(shared));
    let (_, Ok(())) = threads.each_of(wanted, move |layer: Layer| {
        {
            let mut state = shared.state();
            if state.layers.contains_key(&layer.root) || state.asked.contains(&layer.root) {
                return Ok::<_, Infallible>(());
            }
            let under_way = (Instant::now(), Progress::UnderWay);
            state.layers.insert(layer.root, under_way);
        }
        let opened = open_layer(&engine, &layer);
        let mut state = shared.state();
        match opened {
            Ok(export) => {
                let open = (Instant::now(), Progress::Open(export));
                state.layers.insert(layer.root, open);
            }
            // Whoever asks for it meets the same error, and says so.
            Err(_) => {
                state.layers.remove(&layer.root);
            }
        }
        drop(state);
        shared.opened.notify_all();
        Ok(())
    });
    Ok(())
}
