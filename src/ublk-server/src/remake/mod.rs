//! The last source: layers that are made again from the registry's original.
//!
//! ```text
//! submit ─► state of the layer ─┬─ ready ──────────────────────► worker on DIR
//!                               ├─ not yet: queue it ──► "is being made"
//!                               └─ it failed ──────────► why, and when it is tried again
//!
//! thread ─► first of the queue ─► child process: mkfs-accel remake --into DIR
//!                                  progress on stdout; the last line of stderr is why not
//! ```
//!
//! When no other source has given something for `--remake-after`, the layer that it is
//! of is made again in a local directory, laid out as UFS is, by a process of its own
//! with its own login. What comes out must have the layer's root, or it is not kept; and
//! whatever is read of it is verified like everything else. One layer at a time.
//!
//! Nothing here waits for the child but the thread. While the child gets on with it, the
//! deadline of whoever waits for the layer moves; a child that says nothing for
//! `--remake-stall` is ended.
//!
//! Where a layer came from ([`Origin`]) is known from the image record when it is
//! attached, and from the journal afterwards: UFS need not answer any more.

mod job;
mod state;

use crate::protocol::{RemadeLayer, RemakeStatus};
use accel_oci::{ChainId, DiffId, Platform};
use accel_source::{
    Arena, Done, FileName, Operation, Readiness, Request, Source, SourceError, WorkerCommand,
    WorkerSource,
};
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use state::{Answer, State};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use job::run as run_job;

/// How layers are made again.
#[derive(Debug, Clone, Args)]
pub struct RemakeOptions {
    /// A directory on a local disk, for nothing else, in which layers are made again
    /// from the original image when no source has them any more; made if it is missing.
    /// Without it that is not done.
    #[arg(long, value_name = "DIR")]
    pub remake: Option<PathBuf>,
    /// How much of that disk is used at most, such as 20G.
    #[arg(long, value_name = "SIZE", default_value = "20G", value_parser = crate::size::parse)]
    pub remake_size: u64,
    /// How long a read waits for the sources before its layer is made again.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = crate::time::parse)]
    pub remake_after: Duration,
    /// How long making a layer may stand still before it is given up.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = crate::time::parse)]
    pub remake_stall: Duration,
    /// What makes layers; mkfs-accel beside this program, or in PATH, by default.
    #[arg(long, value_name = "PATH")]
    pub remake_program: Option<PathBuf>,
    /// The registries' logins for that: a file like docker's config.json.
    #[arg(long, value_name = "FILE")]
    pub registry_config: Option<PathBuf>,
    /// Talk HTTP instead of HTTPS to the registries.
    #[arg(long)]
    pub remake_plain_http: bool,
}

/// Where a layer came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The image, as `mkfs-accel convert` takes it.
    pub source: String,
    /// Which of a multi-platform one.
    pub platform: Platform,
    /// The layer.
    pub diff_id: DiffId,
    /// The layer on top of those below it.
    pub chain_id: ChainId,
}

/// What is needed to make a layer again.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// What the layer is called.
    pub name: LayerName,
    /// What its bytes must have.
    pub root: Root,
    /// How many there are.
    pub size: ImageSize,
    /// Where it came from.
    pub origin: Origin,
}

/// The last source.
pub struct Remake {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    setup: Setup,
    worker: Arc<WorkerSource>,
    state: Mutex<State>,
    /// There is something to do.
    changed: Condvar,
}

/// What jobs are started with.
#[derive(Debug)]
struct Setup {
    directory: PathBuf,
    program: PathBuf,
    /// The mount namespace to work in.
    namespace: String,
    options: RemakeOptions,
}

impl Remake {
    /// Prepares to make layers in `options`' directory, if there is one. Nothing is
    /// started before [`begin`](Self::begin).
    pub fn start(
        options: &RemakeOptions,
        arena: &Arc<Arena>,
        namespace: &str,
    ) -> Result<Option<Arc<Self>>> {
        let Some(directory) = &options.remake else {
            return Ok(None);
        };
        let directory = std::path::absolute(directory)?;
        let beside = std::env::current_exe().context("cannot find this program")?;
        let beside = beside.with_file_name("mkfs-accel");
        let program = match &options.remake_program {
            Some(program) => std::path::absolute(program)?,
            None if beside.exists() => beside,
            None => "mkfs-accel".into(),
        };
        let name = format!("remade layers in {}", directory.display());
        let command = WorkerCommand {
            program: "/proc/self/exe".into(),
            arguments: vec![
                "source-worker".into(),
                directory.clone().into(),
                "--namespace".into(),
                namespace.into(),
            ],
        };
        let worker = WorkerSource::start(&name, command, Arc::clone(arena))?;
        let mut options = options.clone();
        if let Some(path) = &mut options.registry_config {
            *path = std::path::absolute(&*path)?;
        }
        let shared = Arc::new(Shared {
            name,
            setup: Setup {
                directory,
                program,
                namespace: namespace.to_owned(),
                options,
            },
            worker: Arc::new(worker),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let working = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("remake".to_owned())
            .spawn(move || working.work())
            .context("cannot start a thread")?;
        Ok(Some(Arc::new(Self {
            shared,
            thread: Some(thread),
        })))
    }

    /// What reads the directory.
    pub fn worker(&self) -> &Arc<WorkerSource> {
        &self.shared.worker
    }

    /// From now on all layers that are exported are known: others may go.
    pub fn begin(&self) {
        self.shared.lock().begin();
        self.shared.changed.notify_all();
    }

    /// A layer is exported.
    pub fn know(&self, recipe: Recipe) {
        self.shared.lock().know(recipe);
    }

    /// A layer is not exported any more.
    pub fn forget(&self, name: &LayerName) {
        self.shared.lock().forget(name);
        self.shared.changed.notify_all();
    }

    /// How it stands.
    pub fn status(&self) -> RemakeStatus {
        let state = self.shared.lock();
        let layers = state.describe(Instant::now());
        let layers: Vec<_> = layers
            .into_iter()
            .map(|(name, state)| RemadeLayer { name, state })
            .collect();
        RemakeStatus {
            directory: self.shared.setup.directory.clone(),
            known: state.known(),
            layers,
            made: state.made,
            failed: state.failed,
        }
    }
}

impl Drop for Remake {
    fn drop(&mut self) {
        self.shared.lock().close();
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that makes layers again panicked");
        }
    }
}

impl fmt::Debug for Remake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remake({})", self.shared.name)
    }
}

impl Source for Remake {
    fn submit(&self, request: Request, done: Done) {
        let shared = &self.shared;
        let file = request.file.clone();
        let fresh = matches!(request.operation, Operation::Read { fresh: true, .. });
        let answer = shared.lock().ask(file.as_str(), fresh, Instant::now());
        let origin = shared.name.as_str().into();
        match answer {
            Answer::Read => {
                let watched = Arc::downgrade(shared);
                let done: Done = Box::new(move |outcome| {
                    if let (Err(SourceError::Failed { file, .. }), Some(shared)) =
                        (&outcome, watched.upgrade())
                    {
                        // Removed behind our back: it is made anew when it is asked for.
                        shared.lock().lost(file.as_str());
                    }
                    done(outcome);
                });
                shared.worker.submit(request, done);
            }
            Answer::Making(reason) => {
                shared.changed.notify_all();
                drop(request.slot);
                done(Err(SourceError::Making {
                    file,
                    origin,
                    reason,
                }));
            }
            Answer::NotMade { reason, lasting } => {
                drop(request.slot);
                done(Err(SourceError::NotMade {
                    file,
                    origin,
                    reason,
                    lasting,
                }));
            }
        }
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn readiness(&self, file: &FileName) -> Readiness {
        let after = self.shared.setup.options.remake_after;
        self.shared.lock().readiness(file.as_str(), after)
    }

    fn is_at_work(&self, file: &FileName) -> bool {
        self.shared.lock().is_at_work(file.as_str(), Instant::now())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: one job after the other.
    fn work(&self) {
        loop {
            let work = {
                let waits = |state: &mut State| !state.has_work();
                let waited = self.changed.wait_while(self.lock(), waits);
                waited.unwrap_or_else(PoisonError::into_inner).next()
            };
            let (recipe, keep) = match work {
                state::Work::End => return,
                state::Work::Clean { keep } => (None, keep),
                state::Work::Make { recipe, keep } => (Some(recipe), keep),
            };
            if let Some(recipe) = &recipe {
                let image = &recipe.origin.source;
                tracing::warn!(layer = %recipe.name, image, "making a layer again");
            }
            let began = Instant::now();
            let mut progress = |bytes: Option<u64>| {
                let mut state = self.lock();
                if let Some(bytes) = bytes {
                    state.progress(bytes, Instant::now());
                }
                !state.is_unwanted()
            };
            let result = job::make(&self.setup, recipe.as_deref(), &keep, &mut progress);
            let now = Instant::now();
            match (&recipe, &result) {
                (Some(recipe), Ok(())) => {
                    let seconds = began.elapsed().as_secs();
                    tracing::info!(layer = %recipe.name, seconds, "a layer was made again");
                }
                (Some(recipe), Err(failure)) => tracing::error!(
                    layer = %recipe.name, why = failure.reason,
                    "a layer cannot be made again"
                ),
                (None, Err(failure)) => tracing::warn!(
                    why = failure.reason,
                    "cannot remove layers that were made again"
                ),
                (None, Ok(())) => {}
            }
            self.lock().over(recipe.is_some(), result, now);
        }
    }
}
