//! `ublk-server serve`: puts the daemon together and runs it until a signal.

use crate::admin;
use crate::devices::Devices;
use crate::disk_cache::{self, DiskCacheOptions};
use crate::engine::{Engine, SKIPS_VERIFICATION};
use crate::handover::{self, Handover, Inherited, adopt_children};
use crate::journal::Journal;
use crate::lock::Lock;
use crate::log;
use crate::metrics;
use crate::namespace;
use crate::notify::Notifier;
use crate::paths::Paths;
use crate::registry::Registry;
use crate::remake::{Remake, RemakeOptions};
use crate::threads::{self, Threads};
use accel_client::output::print;
use accel_source::privileges::{CapabilitySet, WRITE, keep_only};
use accel_source::{
    Arena, DiskCache, Patience, Source, Sources, StartError, WorkerCommand, WorkerSource,
};
use accel_transport::Wanted;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Least and most bytes of the cache.
const SMALLEST_CACHE: u64 = 16 << 20;
/// How long UFS may take to answer at start before the daemon goes on without.
const UFS_PATIENCE: Duration = Duration::from_secs(10);

/// How often devices that could not be recovered are tried again.
const RECOVER_AGAIN: Duration = Duration::from_secs(5);

/// What `serve` was told.
#[derive(Debug)]
pub struct Options {
    /// The UFS directory.
    pub ufs: PathBuf,
    /// Further directories with the same files, in the order in which they are
    /// asked when UFS fails.
    pub replicas: Vec<PathBuf>,
    /// How long one source may take to answer.
    pub attempt_timeout: Duration,
    /// How long a read waits for all sources together; zero: for ever.
    pub request_timeout: Duration,
    /// Bytes of memory for chunks and index pages.
    pub cache_size: u64,
    /// Whether the kernel is asked for huge pages for that.
    pub huge_pages: bool,
    /// A tier on local disk.
    pub disk_cache: DiskCacheOptions,
    /// The last source.
    pub remake: RemakeOptions,
    /// Which transport.
    pub transport: Wanted,
    /// How long its threads look for requests before they sleep.
    pub poll: Duration,
    /// Where Prometheus is answered over HTTP, if it is.
    pub metrics: Option<SocketAddr>,
    /// Whether block devices outlive the daemon; not only for a test.
    pub recovery: bool,
    /// Where everything lies.
    pub paths: Paths,
    /// What a program before left to this one, in an upgrade.
    pub inherited: Option<String>,
    /// Only look whether options and journal are understood.
    pub check: bool,
}

/// What the threads of the daemon share.
#[derive(Debug)]
pub struct Daemon {
    /// Exports and holders.
    pub registry: Arc<Registry>,
    /// What requests of clients run on.
    pub threads: Arc<Threads>,
    /// The read engine.
    pub engine: Arc<Engine>,
    /// What it reads from.
    pub sources: Arc<Sources>,
    /// The workers behind that, in the same order.
    pub workers: Vec<Arc<WorkerSource>>,
    /// The tier before them.
    pub disk_cache: Option<Arc<DiskCache>>,
    /// The last of them, which makes layers again.
    pub remake: Option<Arc<Remake>>,
    /// The UFS directory.
    pub ufs: PathBuf,
    /// Where an upgrade is asked for.
    pub handover: Handover,
    /// The mount namespace that the daemon was started in, for its workers.
    host: File,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &Options) -> Result<()> {
    let paths = &options.paths;
    if options.cache_size < SMALLEST_CACHE {
        bail!("--cache-size must be at least 16M");
    }
    if SKIPS_VERIFICATION {
        tracing::error!("THIS BUILD SERVES BYTES WITHOUT VERIFYING THEM; it exists for one test");
    }
    let ufs = std::path::absolute(&options.ufs)?;
    if options.check {
        open_journal(paths, &ufs)?;
        return print(concat!(env!("CARGO_PKG_VERSION"), "\n"));
    }
    let inherited = options.inherited.as_deref();
    let inherited = inherited.map(|text| Inherited::take(text, paths));
    let (lock, inherited) = match inherited.transpose()? {
        Some(inherited) => {
            adopt_children()?;
            let Inherited {
                listener,
                host,
                lock,
            } = inherited;
            (lock, Some((listener, host)))
        }
        None => (claim(paths)?, None),
    };
    let result = serve(options, &ufs, inherited, &lock);
    if matches!(result, Ok(1..)) {
        // Exports stay for the next daemon, which must not begin with them before
        // this process has let go: the lock ends with the process.
        std::mem::forget(lock);
        return Ok(());
    }
    // Empty unless devices stay for the next daemon.
    let _ = fs::remove_dir(paths.run.join("journal"));
    lock.remove();
    paths.tidy();
    result.map(drop)
}

fn open_journal(paths: &Paths, ufs: &Path) -> Result<(Journal, bool)> {
    let journal = Journal::open(&paths.run, ufs)
        .with_context(|| format!("cannot open the journal in {}", paths.run.display()))?;
    let leftovers = !journal
        .load()
        .context("cannot read the journal")?
        .is_empty();
    Ok((journal, leftovers))
}

/// Serves until a signal comes; gives the number of exports that stay for the next
/// daemon. Does not return when another program takes this one's place.
fn serve(
    options: &Options,
    ufs: &Path,
    inherited: Option<(UnixListener, File)>,
    lock: &Lock,
) -> Result<usize> {
    let paths = &options.paths;
    let program = std::env::current_exe().context("cannot find this program")?;
    // UFS is not among them: its workers stay where it is mounted. A hung one must
    // not even be looked at.
    let needed = [
        &*program,
        &*paths.run,
        &*paths.socket,
        Path::new("/usr/lib"),
    ];
    let (journal, leftovers) = open_journal(paths, ufs)?;
    // The processes of the program before may take a moment to end, too.
    let leftovers = leftovers || inherited.is_some();
    let (listener, host) = match inherited {
        // The namespace is the one that the program before entered.
        Some((listener, host)) => (Some(listener), host),
        None => {
            let host =
                File::open("/proc/self/ns/mnt").context("cannot open the mount namespace")?;
            namespace::enter_private(&paths.run, &needed)?;
            prepare_process();
            (None, host)
        }
    };
    // Devices want SYS_ADMIN, and workers the two to enter the mount namespace of UFS;
    // they can have nothing later that is not kept here.
    keep_only(CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT | WRITE)
        .context("cannot drop capabilities")?;
    let (signals, from_signals) = UnixStream::pair().context("cannot make a pipe")?;
    let wake = from_signals.try_clone().context("cannot make a pipe")?;
    let daemon = start(options, ufs, (host, wake), journal, leftovers)?;
    daemon.registry.recover(paths)?;
    if let Some(remake) = &daemon.remake {
        remake.begin();
    }
    recover_later(&daemon)?;
    serve_metrics(&daemon, options.metrics)?;
    let listener = match listener {
        Some(listener) => listener,
        None => listen(&paths.socket)?,
    };
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, from_signals.try_clone()?)
            .context("cannot take signals")?;
    }
    let devices = daemon.registry.devices();
    tracing::info!(
        ufs = %ufs.display(), socket = %paths.socket.display(), transport = devices.name(),
        because = devices.reason, "serving"
    );
    let notifier = Notifier::from_environment();
    notifier.ready(&format!(
        "serving {} over {}",
        ufs.display(),
        devices.name()
    ));
    accept(&daemon, &listener, &signals, &notifier)?;
    if let Some(program) = daemon.handover.take() {
        hand_over(&daemon, &program, &listener, lock);
    }
    tracing::info!("ending");
    notifier.stopping();
    // From here on clients are told that nobody serves.
    let _ = fs::remove_file(&paths.socket);
    drop(listener);
    let left = daemon.registry.shut_down();
    if let Some(cache) = &daemon.disk_cache {
        cache.save();
    }
    if left > 0 {
        tracing::warn!(
            exports = left,
            "exports are in use: who reads them waits until the daemon serves again"
        );
        daemon.registry.devices().hand_over(handover::READS);
        // Requests that are still under way are the next daemon's. Taken down in order,
        // they would be answered with errors.
        std::mem::forget(daemon);
    }
    Ok(left)
}

/// Answers Prometheus, if an address was given.
fn serve_metrics(daemon: &Arc<Daemon>, address: Option<SocketAddr>) -> Result<()> {
    let Some(address) = address else {
        return Ok(());
    };
    let daemon = Arc::downgrade(daemon);
    let render = move || daemon.upgrade().map(|daemon| metrics::render(&daemon));
    let address = metrics::start(address, render)
        .with_context(|| format!("cannot serve metrics at {address}"))?;
    tracing::info!(%address, "metrics are served at /metrics");
    Ok(())
}

/// Puts another program in this one's place.
fn hand_over(daemon: &Arc<Daemon>, program: &Path, listener: &UnixListener, lock: &Lock) -> ! {
    tracing::info!(program = %program.display(), "another program takes over");
    daemon.registry.close();
    daemon.handover.await_clients();
    let ours = handover::program();
    daemon.registry.devices().hand_over(handover::READS);
    // Its devices are not served any more: if the other cannot be run, this one begins
    // anew.
    for program in [program, &ours] {
        let error = handover::become_program(program, listener, &daemon.host, lock);
        tracing::error!(error = format!("{error:#}"), "cannot hand over");
    }
    // Nothing is taken down in order: all of it is for whoever is started next.
    std::process::exit(1);
}

/// Has devices that could not be recovered tried again, as long as there are any.
fn recover_later(daemon: &Arc<Daemon>) -> Result<()> {
    if daemon.registry.all_recovered() {
        return Ok(());
    }
    let daemon = Arc::downgrade(daemon);
    let again = move || {
        loop {
            std::thread::sleep(RECOVER_AGAIN);
            let Some(daemon) = daemon.upgrade() else {
                return;
            };
            if daemon.registry.recover_again() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("recovery".to_owned())
        .spawn(again)
        .context("cannot start a thread")?;
    Ok(())
}

/// Makes sure that this is the only daemon here.
fn claim(paths: &Paths) -> Result<Lock> {
    let other = || {
        format!(
            "another daemon serves at {} (run directory {}): stop it, or choose another --socket",
            paths.socket.display(),
            paths.run.display()
        )
    };
    let lock = Lock::attempt(&paths.daemon_lock())
        .with_context(|| format!("cannot lock {}", paths.daemon_lock().display()))?
        .with_context(other)?;
    if UnixStream::connect(&paths.socket).is_ok() {
        bail!(other());
    }
    Ok(lock)
}

fn prepare_process() {
    // Memory that this process needs must not be got by writing to, or waiting
    // for, its own devices.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::warn!(%error, "PR_SET_IO_FLUSHER failed (it needs CAP_SYS_RESOURCE); going on");
    }
    let files = rustix::process::getrlimit(Resource::Nofile);
    let more = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, more) {
        tracing::debug!(%error, "cannot raise the number of open files");
    }
}

fn start(
    options: &Options,
    ufs: &Path,
    (host, wake): (File, UnixStream),
    journal: Journal,
    leftovers: bool,
) -> Result<Arc<Daemon>> {
    let (chunks, pages) = slots(options.cache_size);
    let arena = Arc::new(Arena::new(chunks, pages)?);
    if options.huge_pages {
        arena.use_huge_pages().context("cannot start a thread")?;
    }
    let mut workers = vec![worker("UFS", ufs, &host, &arena)?];
    for replica in &options.replicas {
        let replica = std::path::absolute(replica)?;
        workers.push(worker("replica", &replica, &host, &arena)?);
    }
    // Those who read devices of an earlier daemon must not wait for UFS.
    if !leftovers {
        await_sources(&workers)?;
    }
    let members = workers.iter().map(|worker| {
        let worker: Arc<dyn Source> = Arc::<WorkerSource>::clone(worker);
        worker
    });
    let mut members: Vec<_> = members.collect();
    let remake = Remake::start(&options.remake, &arena, &namespace_of(&host))?;
    if let Some(remake) = &remake {
        members.push(Arc::<Remake>::clone(remake));
        workers.push(Arc::clone(remake.worker()));
    }
    let sources = Sources::new(members).context("cannot start a thread")?;
    let sources = Arc::new(sources);
    let mut shared: Arc<dyn Source> = Arc::<Sources>::clone(&sources);
    let (tier, namespace) = (&options.disk_cache, namespace_of(&host));
    let disk_cache = disk_cache::start(tier, &shared, &arena, &namespace, !leftovers)?;
    if let Some(cache) = &disk_cache {
        shared = Arc::<DiskCache>::clone(cache);
    }
    let limit = options.request_timeout;
    let patience = Patience {
        attempt: options.attempt_timeout,
        whole: (!limit.is_zero()).then_some(limit),
        ..Patience::DATA
    };
    let engine = Engine::start(shared, arena, patience).context("cannot start the verifiers")?;
    let devices = Devices::start(
        options.transport,
        &options.paths,
        options.poll,
        options.recovery,
    )?;
    let threads = Threads::start(threads::COUNT).context("cannot start threads")?;
    let threads = Arc::new(threads);
    let (served, known) = (Arc::clone(&engine), Arc::clone(&threads));
    let mut registry = Registry::new(served, devices, journal, ufs.to_owned(), known)?;
    registry.make_again_with(remake.clone());
    Ok(Arc::new(Daemon {
        registry: Arc::new(registry),
        threads,
        engine,
        sources,
        workers,
        disk_cache,
        remake,
        ufs: ufs.to_owned(),
        handover: Handover::new(wake),
        host,
    }))
}

/// A name for the mount namespace, by which other processes of ours can enter it.
fn namespace_of(host: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), host.as_raw_fd())
}

fn worker(
    kind: &str,
    directory: &Path,
    host: &File,
    arena: &Arc<Arena>,
) -> Result<Arc<WorkerSource>> {
    let namespace = namespace_of(host);
    let command = WorkerCommand {
        program: "/proc/self/exe".into(),
        arguments: vec![
            "--log-format".into(),
            log::format().to_string().into(),
            "source-worker".into(),
            directory.into(),
            "--namespace".into(),
            namespace.into(),
        ],
    };
    let name = format!("{kind} {}", directory.display());
    let source = WorkerSource::start(&name, command, Arc::clone(arena))?;
    Ok(Arc::new(source))
}

/// Waits until it is known of every source whether it can be read; an error if
/// none of them can.
fn await_sources(workers: &[Arc<WorkerSource>]) -> Result<()> {
    let until = Instant::now() + UFS_PATIENCE;
    let mut unusable = Vec::new();
    for worker in workers {
        let left = until.saturating_duration_since(Instant::now());
        match worker.wait_ready(left) {
            Ok(()) => {}
            Err(StartError::Worker { reason, .. }) => {
                tracing::warn!(source = worker.name(), reason, "a source cannot be read");
                unusable.push(reason);
            }
            Err(error @ StartError::Silent { .. }) => tracing::warn!(%error, "going on"),
            Err(error) => return Err(error.into()),
        }
    }
    if unusable.len() == workers.len() {
        bail!(
            "cannot read UFS: {}; mount the shared file system there, \
             or give the directory that has it with --ufs",
            unusable.join("; ")
        );
    }
    Ok(())
}

/// How the cache's bytes are divided: a 32nd for pages of the index (a page
/// covers 16 MiB of an image), the rest for chunks.
fn slots(bytes: u64) -> (usize, usize) {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let pages = bytes / 32 / (4 << 10);
    let chunks = (bytes - pages * (4 << 10)) / (128 << 10);
    (chunks, pages)
}

fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    // Nobody serves there: the lock is ours.
    let _ = fs::remove_file(socket);
    let mask = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(mask);
    let listener = listener.with_context(|| format!("cannot listen at {}", socket.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Takes connections until a signal comes.
fn accept(
    daemon: &Arc<Daemon>,
    listener: &UnixListener,
    signals: &UnixStream,
    notifier: &Notifier,
) -> Result<()> {
    let interval = notifier.interval();
    let limit = interval.and_then(|interval| Timespec::try_from(interval).ok());
    let mut told: Option<Instant> = None;
    // For a client that comes when no other file can be opened: it is told so.
    let mut reserve = File::open("/dev/null").ok();
    loop {
        if let Some(interval) = interval
            && told.is_none_or(|told| told.elapsed() >= interval)
            && daemon.registry.responds()
        {
            notifier.alive();
            told = Some(Instant::now());
        }
        let mut polled = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error).context("cannot wait for clients"),
        }
        if !polled[1].revents().is_empty() {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, _)) => admin::serve(daemon, stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
                drop(reserve.take());
                if let Ok((stream, _)) = listener.accept() {
                    admin::refuse(&stream, "the daemon has no file descriptors left");
                }
                reserve = File::open("/dev/null").ok();
                if reserve.is_none() {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            Err(error) => tracing::warn!(%error, "cannot take a connection"),
        }
    }
}
