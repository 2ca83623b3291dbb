//! Torture: a verified load while everything that may break does, at random.
//!
//! ```text
//! readers ─► /dev/ublkbN (O_DIRECT), EROFS mounts ─► daemon ─┬─► NFS mount ──► knfsd ─► store-0
//!    every byte is known                             ▲       ├─► FUSE mount ─► process ─► store-1
//!                                             SIGKILL, and   └─► store-2
//!                                             started again         ▲ bytes flipped, files cut,
//!                                                                   removed, replaced, repaired
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`images`] | images whose every byte is known |
//! | [`load`] | reads and compares; counts |
//! | [`node`] | the daemon, its supervisor, its clients |
//! | [`trouble`] | kills, stalls, damage |
//! | [`churn`] | images that come and go meanwhile |
//! | [`passthrough`] | the FUSE file system that stalls |
//! | [`server`] | another run: an NFS server that goes away, under readers |
//! | [`leases`] | another run: converters on NFS |
//! | [`stuck`] | another run: UFS hangs in the kernel while daemons die and recover |
//!
//! A wrong byte, an error, a read that never ends, a device that is lost or left over
//! is what must not happen.

pub mod churn;
pub mod images;
pub mod leases;
pub mod load;
pub mod node;
pub mod passthrough;
pub mod server;
pub mod stuck;
pub mod trouble;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread::Scope;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::leftovers::State;
use crate::nfs::{self, Mode};
use crate::random::Random;
use crate::{Setting, drop_caches};
use images::Made;
use load::{Reader, Slot, Tally};
use node::{Node, Serve};
use trouble::{Kind, Store};

/// Bytes of all images together, about.
const ALL_BYTES: u64 = 128 << 20;
const SMALLEST: u64 = 2 << 20;
const LARGEST: u64 = 24 << 20;
/// Images that come and go.
const CHURNED: usize = 2;
/// Readers of devices, and of files.
const READERS: usize = 3;
/// A read that takes longer will never end: no stall is nearly as long.
const HANG: Duration = Duration::from_secs(300);

/// So many times longer a run may take if too little has happened.
const SLOW: u64 = 4;

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    pub seconds: u64,
    pub seed: u64,
    pub devices: usize,
    /// Put UFS on NFS, and how; none: in a plain directory.
    pub nfs: Option<Mode>,
    /// Devices that end with their daemon: there must be errors.
    pub without_recovery: bool,
}

/// Everything that the threads share.
#[derive(Debug)]
pub struct Scene {
    pub options: Options,
    pub tally: Tally,
    pub images: Vec<Made>,
    pub stores: Vec<Store>,
    pub node: Node,
    /// Devices that are there all the time.
    pub devices: Mutex<Vec<PathBuf>>,
    pub slots: Vec<Slot>,
    /// Commands under way.
    pub operating: AtomicU64,
    calm: AtomicBool,
    over: AtomicBool,
    readers: AtomicUsize,
    troubles: AtomicUsize,
    since: Instant,
}

impl Scene {
    /// Nothing more is to break.
    pub fn is_calm(&self) -> bool {
        self.calm.load(Relaxed)
    }

    /// Readers are to end.
    pub fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// Of the run.
    pub fn milliseconds(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Sleeps, but not into the calm.
    pub fn sleep(&self, time: Duration) {
        let since = Instant::now();
        while !self.is_calm()
            && let Some(left) = time.checked_sub(since.elapsed())
        {
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// Runs it; true if all was well.
///
/// # Errors
/// When it cannot be set up.
pub fn run(setting: &Setting, options: &Options) -> Result<bool> {
    let before = State::now(setting)?;
    let scratch = setting.scratch_dir()?;
    let good = run_in(setting, options, scratch.path())?;
    drop(scratch);
    if options.without_recovery {
        return Ok(good);
    }
    let left = before.check_same_now(setting);
    if let Err(error) = &left {
        println!("BAD: {error:#}");
    }
    Ok(good && left.is_ok())
}

fn run_in(setting: &Setting, options: &Options, scratch: &Path) -> Result<bool> {
    let began = Instant::now();
    let stores = prepare_stores(options, scratch)?;
    let images = prepare_images(setting, options, &stores, scratch)?;
    let directory = scratch.join("node");
    fs::create_dir(&directory)?;
    let node = Node::start(Serve {
        program: setting.ublk_server(),
        sources: stores.iter().map(|store| store.path.clone()).collect(),
        transport: setting.transport.clone(),
        directory,
        further: match options.without_recovery {
            true => vec!["--without-recovery".to_owned()],
            false => Vec::new(),
        },
    })?;
    let scene = Scene {
        options: options.clone(),
        tally: Tally::default(),
        images,
        stores,
        node,
        devices: Mutex::default(),
        slots: (0..2 * READERS + CHURNED + 2)
            .map(|_| Slot::default())
            .collect(),
        operating: AtomicU64::new(0),
        calm: AtomicBool::new(false),
        over: AtomicBool::new(false),
        readers: AtomicUsize::new(0),
        troubles: AtomicUsize::new(0),
        since: Instant::now(),
    };
    println!(
        "torture: seed {}, {} devices, {} s; prepared in {:.1} s",
        options.seed,
        options.devices,
        options.seconds,
        began.elapsed().as_secs_f64()
    );
    let result = play(&scene, scratch);
    scene.node.end();
    if result.is_err() || options.without_recovery {
        sweep(scratch);
    }
    for store in &scene.stores {
        if let Kind::Fuse { server, .. } = &store.kind {
            // It ends when it is unmounted.
            let _ = rustix::mount::unmount(&store.path, rustix::mount::UnmountFlags::DETACH);
            let pid = Pid::from_child(server);
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }
    result?;
    Ok(verdict(&scene))
}

/// Prints what was seen; whether it is good, and enough.
fn verdict(scene: &Scene) -> bool {
    let tally = &scene.tally;
    let get = |figure: &AtomicU64| figure.load(Relaxed);
    println!(
        "torture: {} of {} kills with reads in flight; longest from SIGKILL to death {} ms, from a \
         start to the first answer {} ms; {} commands, {} kills of workers, {} reads failed that \
         had to",
        get(&tally.kills_in_flight),
        get(&tally.kills),
        get(&scene.node.slowest_death),
        get(&scene.node.slowest_start),
        get(&tally.operations),
        get(&tally.worker_kills),
        get(&tally.refused),
    );
    let bad = get(&tally.wrong) + get(&tally.errors);
    let enough = is_enough(scene);
    if !enough {
        println!("torture: too little has happened to mean anything");
    }
    println!("{}", tally.line());
    bad == 0 && enough
}

/// Whether as much has happened as the time asked for has to bring.
fn is_enough(scene: &Scene) -> bool {
    let tally = &scene.tally;
    let get = |figure: &AtomicU64| figure.load(Relaxed);
    let seconds = scene.options.seconds;
    if scene.options.without_recovery {
        // Nothing more happens after some kills.
        return get(&tally.errors) > 0 && get(&tally.kills) > 1;
    }
    get(&tally.reads) >= 20 + seconds
        && get(&tally.kills) >= 2.max(seconds / 30)
        && get(&tally.kills_in_flight) * 2 >= get(&tally.kills)
        && get(&tally.stalls) > 0
        && get(&tally.repaired) > 0
        && (seconds < 60 || get(&tally.refused) > 0)
}

fn prepare_stores(options: &Options, scratch: &Path) -> Result<Vec<Store>> {
    let mut stores = Vec::new();
    for number in 0..3 {
        let backing = scratch.join(format!("store-{number}"));
        fs::create_dir(&backing)?;
        let path = scratch.join(format!("source-{number}"));
        let (path, kind) = match (number, options.nfs) {
            (0, Some(mode)) => {
                fs::create_dir(&path)?;
                let mut server = nfs::Server::start(&backing)?;
                server.mount(&path, mode)?;
                (path, Kind::Nfs(Mutex::new(server)))
            }
            (1, _) => {
                fs::create_dir(&path)?;
                let stall = scratch.join("stall");
                let server = Command::new(std::env::current_exe()?)
                    .arg("passthrough")
                    .args([&backing, &path, &stall])
                    .stdin(Stdio::null())
                    .spawn()
                    .context("starting the FUSE file system")?;
                let since = Instant::now();
                while !is_mounted(&path)? {
                    ensure!(
                        since.elapsed() < HANG,
                        "the FUSE file system does not appear"
                    );
                    std::thread::sleep(Duration::from_millis(10));
                }
                (path, Kind::Fuse { stall, server })
            }
            _ => (backing.clone(), Kind::Plain),
        };
        stores.push(Store {
            backing,
            path,
            kind,
            names: Mutex::default(),
        });
    }
    Ok(stores)
}

fn is_mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let path = path.to_string_lossy();
    Ok(mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(&*path)))
}

/// Those that stay, those that come and go, the victim.
fn prepare_images(
    setting: &Setting,
    options: &Options,
    stores: &[Store],
    scratch: &Path,
) -> Result<Vec<Made>> {
    let number = (options.devices + CHURNED + 1) as u64;
    let size = (ALL_BYTES / number).clamp(SMALLEST, LARGEST);
    let mkfs = setting.bin.join("mkfs-accel");
    let images = (0..number).map(|number| {
        let ufs = &stores[0].backing;
        images::make(&mkfs, ufs, scratch, options.seed, number, size)
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    for store in &stores[1..] {
        let copied = Command::new("cp")
            .arg("-a")
            .args([stores[0].backing.join("."), store.backing.clone()])
            .status()?;
        ensure!(copied.success(), "cp failed");
    }
    Ok(images)
}

fn play(scene: &Scene, scratch: &Path) -> Result<()> {
    let steady = scene.options.devices;
    let roots: Vec<_> = (0..scene.images.len())
        .map(|number| scratch.join(format!("mnt-{number}")))
        .collect();
    for root in &roots {
        fs::create_dir(root)?;
    }
    let mut devices = Vec::new();
    for (made, root) in scene.images.iter().zip(&roots).take(steady) {
        devices.push(churn::attach(scene, made, None)?);
        churn::mount(scene, made, root, None)?;
    }
    let victim = scene.images.len() - 1;
    let victim_device = churn::attach(scene, &scene.images[victim], None)?;
    scene
        .devices
        .lock()
        .map_err(|_| anyhow::anyhow!("poisoned"))?
        .clone_from(&devices);
    let mut seeds = Random::new(scene.options.seed);
    std::thread::scope(|scope| {
        let mut slots = scene.slots.iter();
        let mut slot = || slots.next().context("too few slots");
        for number in 0..2 * READERS {
            let (seed, slot) = (seeds.next_u64(), slot()?);
            let (devices, roots) = (&devices, &roots);
            scene.readers.fetch_add(1, Relaxed);
            scope.spawn(move || {
                let mut reader = Reader::new(scene, slot, seed);
                while !scene.is_over() {
                    let image = usize::try_from(reader.random.below(steady as u64)).unwrap_or(0);
                    let made = &scene.images[image];
                    if number % 2 == 0 {
                        reader.device(&devices[image], made, 8);
                        continue;
                    }
                    if reader.random.below(12) == 0 {
                        let _ = drop_caches();
                        reader.tree(&roots[image], &made.files);
                    }
                    reader.files(&roots[image], &made.files, 8);
                }
                scene.readers.fetch_sub(1, Relaxed);
            });
        }
        let (one, two, three) = (seeds.next_u64(), seeds.next_u64(), seeds.next_u64());
        trouble(scope, scene, move || trouble::kills(scene, one));
        if !scene.options.without_recovery {
            trouble(scope, scene, move || trouble::stalls(scene, two));
            trouble(scope, scene, move || trouble::damage(scene, three));
            for (made, root) in scene.images.iter().zip(&roots).skip(steady).take(CHURNED) {
                let (seed, slot, root) = (seeds.next_u64(), slot()?, root.clone());
                trouble(scope, scene, move || {
                    churn::churn(scene, &mut Reader::new(scene, slot, seed), made, &root);
                });
            }
            let (seed, slot, device) = (seeds.next_u64(), slot()?, victim_device.clone());
            trouble(scope, scene, move || {
                let mut reader = Reader::new(scene, slot, seed);
                trouble::victim(scene, &mut reader, &device, &scene.images[victim]);
            });
        }
        watch(scene);
        Ok::<_, anyhow::Error>(())
    })?;
    if scene.options.without_recovery {
        return Ok(());
    }
    finish(scene, &devices, &roots)
}

/// A thread that breaks something, until the calm.
fn trouble<'scope>(
    scope: &'scope Scope<'scope, '_>,
    scene: &'scope Scene,
    act: impl FnOnce() + Send + 'scope,
) {
    scene.troubles.fetch_add(1, Relaxed);
    scope.spawn(move || {
        act();
        scene.troubles.fetch_sub(1, Relaxed);
    });
}

/// Lets the time pass, and ends the run.
fn watch(scene: &Scene) {
    let mut told = Instant::now();
    let mut since = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        if let Err(error) = scene.node.supervise() {
            scene.tally.error(&format!("{error:#}"));
        }
        for slot in &scene.slots {
            if let Some((time, what)) = slot.under_way(scene)
                && time > HANG
            {
                give_up(
                    scene,
                    &format!("a read of {what} has not ended for {time:?}"),
                );
            }
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!(
                "{:>6} s  {}",
                scene.milliseconds() / 1000,
                scene.tally.line()
            );
        }
        let elapsed = scene.milliseconds() / 1000;
        let (seconds, enough) = (scene.options.seconds, is_enough(scene));
        let is_time = match scene.options.without_recovery {
            true => enough || elapsed >= seconds,
            // A slow machine gets more time for as much to happen.
            false => elapsed >= seconds && (enough || elapsed >= SLOW * seconds),
        };
        if !scene.is_calm() && is_time {
            scene.calm.store(true, Relaxed);
            since = Instant::now();
        }
        if scene.is_calm() && scene.troubles.load(Relaxed) == 0 && !scene.is_over() {
            scene.over.store(true, Relaxed);
            since = Instant::now();
        }
        if scene.is_over() && scene.readers.load(Relaxed) == 0 {
            return;
        }
        if scene.is_calm() && since.elapsed() > 2 * HANG {
            give_up(scene, "what was under way at the end does not end");
        }
    }
}

/// Nothing can be waited for any more: tells what is known and ends the process.
fn give_up(scene: &Scene, why: &str) -> ! {
    scene.tally.error(why);
    println!("--- tasks that cannot be killed, and the daemon's");
    let daemon = scene.node.pid();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name();
        let tasks = fs::read_dir(process.path().join("task"));
        for task in tasks.into_iter().flatten().flatten() {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let status = read("status");
            if status.contains("\nState:\tD") || *pid == *daemon.to_string() {
                println!(
                    "{} {}{}",
                    task.path().display(),
                    read("comm"),
                    read("stack")
                );
            }
        }
    }
    println!(
        "--- the end of the daemon's log\n{}\n---",
        scene.node.log(60)
    );
    println!("{}", scene.tally.line());
    std::process::exit(1);
}

/// All is calm: everything has to be there and right, and can be taken down.
fn finish(scene: &Scene, devices: &[PathBuf], roots: &[PathBuf]) -> Result<()> {
    scene.node.await_answer(Duration::from_secs(240))?;
    let slot = scene.slots.last().context("no slots")?;
    let mut reader = Reader::new(scene, slot, scene.options.seed);
    drop_caches()?;
    for ((made, device), root) in scene.images.iter().zip(devices).zip(roots) {
        reader.whole_device(device, made);
        reader.tree(root, &made.files);
    }
    let note = |result: Result<()>| {
        if let Err(error) = result {
            scene.tally.error(&format!("at the end: {error:#}"));
        }
    };
    for ((made, root), _) in scene.images.iter().zip(roots).zip(devices) {
        note(churn::unmount(scene, root, None));
        note(churn::detach(scene, made, None));
    }
    if let Some(made) = scene.images.last() {
        note(churn::detach(scene, made, None));
    }
    let status = scene.node.status()?;
    if status["exports"]
        .as_array()
        .is_none_or(|exports| !exports.is_empty())
    {
        scene
            .tally
            .error(&format!("exports are left: {}", status["exports"]));
    }
    let log = scene.node.log(usize::MAX);
    for line in log.lines().filter(|line| line.contains("panicked")) {
        scene.tally.error(&format!("the daemon's log: {line}"));
    }
    note(scene.node.stop());
    Ok(())
}

/// After a failure: whatever is mounted beneath, so that the directory can go.
fn sweep(scratch: &Path) {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
        return;
    };
    let scratch = scratch.to_string_lossy();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let ours: Vec<_> = points
        .filter(|point| point.starts_with(&*scratch))
        .collect();
    for point in ours.into_iter().rev() {
        if !point.contains("/source-") {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
