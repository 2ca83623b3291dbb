//! `accel-snapshotter serve`: puts the snapshotter together and runs it until a
//! signal. Mounts and containers stay as they are when it ends.

use crate::layers::Layers;
use crate::mounts::Places;
use crate::remote::Budget;
use crate::service::Service;
use crate::service::wire::snapshots::snapshots_server::SnapshotsServer;
use crate::service::wire::status::status_server::StatusServer;
use crate::snapshotter::{Choices, Snapshotter};
use accel_client::lock::Lock;
use accel_client::notify::Notifier;
use accel_client::paths::Paths;
use anyhow::{Context, Result};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

/// How often mounts are compared with what the daemon serves.
const MENDING: Duration = Duration::from_secs(5);
/// After how many times of that it is looked for layers that nobody needs: those of
/// pulls that did not wait for them.
const SWEEPING: u32 = 6;
/// containerd sends labels of up to 4 KiB each.
const MAX_MESSAGE: usize = 16 << 20;

/// What `serve` was told.
#[derive(Debug)]
pub struct Options {
    /// Where snapshots are kept.
    pub root: PathBuf,
    /// Where containerd asks.
    pub socket: PathBuf,
    /// `ublk-server`'s socket and run directory.
    pub server: Paths,
    /// The UFS that layers have to come from; none: whichever `ublk-server` reads.
    pub ufs: Option<PathBuf>,
    /// The time that a pull may spend on lazy layers.
    pub budget: Duration,
    /// How snapshots are made.
    pub how: Choices,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &Options) -> Result<()> {
    let root = std::path::absolute(&options.root)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&root)
        .with_context(|| format!("cannot make {}", root.display()))?;
    // The kernel's list of mounts has real paths.
    let root = root.canonicalize()?;
    check_characters(&root)?;
    let places = Places::new(&root);
    let lock = Lock::attempt(&places.lock())
        .with_context(|| format!("cannot lock {}", places.lock().display()))?
        .with_context(|| format!("another snapshotter uses {}: stop it first", root.display()))?;
    let ufs = options
        .ufs
        .as_deref()
        .map(std::path::absolute)
        .transpose()?;
    let layers = Layers::new(places.clone(), options.server.clone(), ufs);
    layers.check_ufs()?;
    let snapshotter = Snapshotter::open(places, layers, Budget::new(options.budget), options.how)?;
    let snapshotter = Arc::new(snapshotter);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let result = runtime.block_on(serve(options, &snapshotter));
    // Whatever waits for the daemon or UFS must not be waited for.
    runtime.shutdown_background();
    let _ = fs::remove_file(&options.socket);
    lock.remove();
    result
}

/// containerd passes paths in overlay options, where these have a meaning.
fn check_characters(root: &Path) -> Result<()> {
    let text = root.to_str().context("the path of --root must be UTF-8")?;
    anyhow::ensure!(
        !text.contains([':', ',', '\\', ' ']),
        "the path of --root must have no colon, comma, backslash or blank: {text}"
    );
    Ok(())
}

async fn serve(options: &Options, snapshotter: &Arc<Snapshotter>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot take signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot take signals")?;
    let keeper = Arc::clone(snapshotter);
    std::thread::Builder::new()
        .name("keeper".to_owned())
        .spawn(move || keep(&keeper))
        .context("cannot start a thread")?;
    let listener = listen(&options.socket)?;
    tracing::info!(
        socket = %options.socket.display(), root = %options.root.display(),
        server = %options.server.socket.display(), trust_ufs = options.how.trust_ufs, "serving"
    );
    let service = Service(Arc::clone(snapshotter));
    let snapshots = SnapshotsServer::new(service.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let server = tonic::transport::Server::builder()
        .add_service(snapshots)
        .add_service(StatusServer::new(service))
        .serve_with_incoming(UnixListenerStream::new(listener));
    // containerd, which is started when this has been told, can ask from here on.
    let notifier = Notifier::from_environment();
    notifier.ready(&format!("for containerd at {}", options.socket.display()));
    tokio::select! {
        served = server => served.context("cannot serve")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notifier.stopping();
    tracing::info!("ending; mounts stay as they are");
    Ok(())
}

/// Cleans up what an earlier run left, then keeps layers mounted.
fn keep(snapshotter: &Snapshotter) {
    if let Err(error) = snapshotter.clean_up() {
        tracing::warn!(%error, "cannot clean up");
    }
    let mut forgotten = false;
    let mut trouble = String::new();
    for round in 1u32.. {
        if round.is_multiple_of(SWEEPING)
            && snapshotter.has_unneeded_layers()
            && let Err(error) = snapshotter.clean_up()
        {
            tracing::warn!(%error, "cannot clean up");
        }
        if !forgotten {
            forgotten = snapshotter.forget_others().is_ok();
        }
        let now = match snapshotter.mend() {
            Ok(()) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        // Once, not every time.
        if now != trouble && !now.is_empty() {
            tracing::warn!(
                error = now,
                "lazy layers cannot be looked after; going on trying"
            );
        }
        trouble = now;
        std::thread::sleep(MENDING);
    }
}

fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("somebody serves at {} already", socket.display());
    }
    let _ = fs::remove_file(socket);
    let mask = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(mask);
    listener.with_context(|| format!("cannot listen at {}", socket.display()))
}
