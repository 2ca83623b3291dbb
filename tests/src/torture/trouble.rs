//! What goes wrong: kills, stalls, damage. Each is undone after a while, so that a read
//! which waits for it ends.
//!
//! Whatever happens, some source has right bytes of every image, or will have when a
//! stall has ended: each image has a source of its own that is never damaged. The only
//! exception is the *victim*, of which no source has right bytes for a while, and whose
//! reads there have to fail.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};

use super::images::Made;
use super::load::Reader;
use super::{Scene, node};
use crate::nfs;
use crate::random::Random;

const CHUNK: u64 = 128 << 10;
/// Reads between two kills, unless they are stalled.
const READS: u64 = 20;
/// What is away for a while is called.
const AWAY: &str = "layers.away";

/// A directory with all images.
#[derive(Debug)]
pub struct Store {
    /// Where its files really lie.
    pub backing: PathBuf,
    /// Where the daemon finds it.
    pub path: PathBuf,
    pub kind: Kind,
    /// Held by whoever changes names in it.
    pub names: Mutex<()>,
}

/// What is between the daemon and the files.
#[derive(Debug)]
pub enum Kind {
    /// Nothing.
    Plain,
    /// The kernel's NFS client and server.
    Nfs(Mutex<nfs::Server>),
    /// A FUSE file system that stalls while the file is there.
    Fuse { stall: PathBuf, server: Child },
}

/// The way in which a source stalls.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// The server is stopped, the process is stopped, the files are not there.
    Down,
    /// The cable is cut; requests are taken and never answered.
    Silent,
}

impl Store {
    fn stall(&self, way: Way) -> Result<()> {
        match (&self.kind, way) {
            (Kind::Plain, _) => Ok(fs::rename(self.layers(), self.backing.join(AWAY))?),
            (Kind::Nfs(server), Way::Down) => lock(server).down(),
            (Kind::Nfs(server), Way::Silent) => lock(server).cut(),
            (Kind::Fuse { server, .. }, Way::Down) => signal(server.id(), Signal::STOP),
            (Kind::Fuse { stall, .. }, Way::Silent) => Ok(fs::write(stall, "")?),
        }
    }

    fn go_on(&self, way: Way) -> Result<()> {
        match (&self.kind, way) {
            (Kind::Plain, _) => Ok(fs::rename(self.backing.join(AWAY), self.layers())?),
            (Kind::Nfs(server), Way::Down) => lock(server).up(),
            (Kind::Nfs(server), Way::Silent) => lock(server).mend(),
            (Kind::Fuse { server, .. }, Way::Down) => signal(server.id(), Signal::CONT),
            (Kind::Fuse { stall, .. }, Way::Silent) => Ok(fs::remove_file(stall)?),
        }
    }

    fn layers(&self) -> PathBuf {
        self.backing.join("layers")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?);
    if let Some(pid) = pid {
        kill_process(pid, signal)?;
    }
    Ok(())
}

fn report(scene: &Scene, what: &str, result: Result<()>) {
    if let Err(error) = result {
        scene.tally.error(&format!("{what}: {error:#}"));
    }
}

/// Kills the daemon, at any moment, also while it recovers, attaches and detaches.
pub fn kills(scene: &Scene, seed: u64) {
    let mut random = Random::new(seed);
    // Emulated machines take long to start a daemon; there should be kills enough.
    let mean = (scene.options.seconds * 1000 / 400).clamp(1500, 6000);
    while !scene.is_calm() {
        let moment = random.below(4);
        if moment == 3 {
            // Soon after somebody has begun to attach or detach.
            let since = Instant::now();
            while scene.operating.load(Relaxed) == 0
                && since.elapsed() < Duration::from_secs(10)
                && !scene.is_calm()
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            std::thread::sleep(Duration::from_millis(random.below(400)));
        } else {
            // Kills alone are no load: some reads come first, if they come.
            let (since, before) = (Instant::now(), scene.tally.reads.load(Relaxed));
            while scene.tally.reads.load(Relaxed) < before + READS
                && since.elapsed() < Duration::from_secs(20)
                && !scene.is_calm()
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            scene.sleep(Duration::from_millis(random.below(mean * 2)));
        }
        if scene.is_calm() {
            break;
        }
        kill(scene);
        if moment == 2 {
            // Once more, while the next one recovers.
            let usual = scene.node.slowest_start.load(Relaxed).max(50);
            std::thread::sleep(Duration::from_millis(random.below(usual)));
            kill(scene);
        }
        let answered = scene.node.await_answer(Duration::from_secs(240));
        report(scene, "after a kill", answered.map(drop));
    }
}

fn kill(scene: &Scene) {
    let count = || -> u64 {
        let devices = lock(&scene.devices);
        let kernel: Vec<_> = devices
            .iter()
            .filter_map(|path| node::in_flight(path))
            .collect();
        match kernel.is_empty() {
            false => kernel.iter().sum(),
            true => scene.slots.iter().filter(|slot| slot.is_reading()).count() as u64,
        }
    };
    let since = Instant::now();
    let mut in_flight = count();
    while in_flight == 0 && since.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(1));
        in_flight = count();
    }
    let killed = scene.node.kill();
    scene.tally.kills.fetch_add(1, Relaxed);
    scene.tally.in_flight_at_kill.fetch_add(in_flight, Relaxed);
    scene
        .tally
        .kills_in_flight
        .fetch_add(u64::from(in_flight > 0), Relaxed);
    report(scene, "killing the daemon", killed);
}

/// Stalls sources, and their workers, for a while; sometimes all of them.
pub fn stalls(scene: &Scene, seed: u64) {
    let mut random = Random::new(seed);
    while !scene.is_calm() {
        scene.sleep(Duration::from_millis(500 + random.below(6000)));
        if scene.is_calm() {
            return;
        }
        let kind = random.below(8);
        if kind < 2 {
            stop_a_worker(scene, &mut random);
            continue;
        }
        let which = random.below(scene.stores.len() as u64);
        let chosen: Vec<_> = (0_u64..)
            .zip(&scene.stores)
            .filter(|(number, _)| kind == 7 || *number == which)
            .map(|(_, store)| {
                let way = [Way::Down, Way::Silent][usize::from(random.below(2) == 0)];
                (store, way, lock(&store.names))
            })
            .collect();
        for (store, way, _) in &chosen {
            report(scene, "stalling a source", store.stall(*way));
            scene.tally.stalls.fetch_add(1, Relaxed);
        }
        // Longer than an attempt, and shorter; not much when nothing is left.
        let longest = if kind == 7 { 5000 } else { 12_000 };
        scene.sleep(Duration::from_millis(300 + random.below(longest)));
        for (store, way, _) in &chosen {
            report(scene, "ending a stall", store.go_on(*way));
        }
    }
}

/// A worker process is killed, or stops until the daemon has had enough of it.
fn stop_a_worker(scene: &Scene, random: &mut Random) {
    let workers = scene.node.workers();
    if workers.is_empty() {
        return;
    }
    let which = usize::try_from(random.below(workers.len() as u64)).unwrap_or(0);
    // It may be gone already.
    if random.below(2) == 0 {
        let _ = signal(workers[which], Signal::KILL);
        scene.tally.worker_kills.fetch_add(1, Relaxed);
    } else {
        let _ = signal(workers[which], Signal::STOP);
        scene.tally.stalls.fetch_add(1, Relaxed);
        scene.sleep(Duration::from_millis(random.below(20_000)));
        let _ = signal(workers[which], Signal::CONT);
    }
}

/// A file that is damaged.
struct Damaged {
    image: usize,
    store: usize,
    file: usize,
    until: Instant,
}

/// Flips bytes, cuts files short, removes and replaces them; later makes them right.
pub fn damage(scene: &Scene, seed: u64) {
    const AT_ONCE: usize = 4;
    let mut random = Random::new(seed);
    let mut damaged: Vec<Damaged> = Vec::new();
    loop {
        let now = Instant::now();
        let calm = scene.is_calm();
        let mut at = 0;
        while at < damaged.len() {
            if damaged[at].until > now && !calm {
                at += 1;
                continue;
            }
            let this = &damaged[at];
            let store = &scene.stores[this.store];
            let guard = match store.names.try_lock() {
                Ok(guard) => guard,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    at += 1;
                    continue;
                }
            };
            let made = &scene.images[this.image];
            let path = store.backing.join(&made.published[this.file]);
            let repaired = repair(&path, &made.bytes[this.file], random.below(2) == 0);
            drop(guard);
            report(scene, "repairing a file", repaired);
            scene.tally.repaired.fetch_add(1, Relaxed);
            damaged.swap_remove(at);
        }
        if calm && damaged.is_empty() {
            return;
        }
        if !calm && damaged.len() < AT_ONCE {
            let image = usize::try_from(random.below(scene.images.len() as u64 - 1)).unwrap_or(0);
            let store = usize::try_from(random.below(scene.stores.len() as u64)).unwrap_or(0);
            let same = |other: &Damaged| (other.image, other.store) == (image, store);
            // The victim is the last image.
            let spared = image % scene.stores.len() == store || damaged.iter().any(same);
            let file = usize::from(random.below(5) == 0);
            let made = &scene.images[image];
            let path = scene.stores[store].backing.join(&made.published[file]);
            if !spared && let Ok(_guard) = scene.stores[store].names.try_lock() {
                let result = harm(&path, &made.bytes[file], &mut random);
                report(scene, "damaging a file", result);
                scene.tally.corrupted.fetch_add(1, Relaxed);
                let hold = Duration::from_millis(200 + random.below(8000));
                let until = Instant::now() + hold;
                damaged.push(Damaged {
                    image,
                    store,
                    file,
                    until,
                });
            }
        }
        std::thread::sleep(Duration::from_millis(100 + random.below(900)));
    }
}

fn harm(path: &Path, right: &[u8], random: &mut Random) -> Result<()> {
    let size = right.len() as u64;
    match random.below(8) {
        0 => Ok(fs::remove_file(path)?),
        1 => {
            let file = OpenOptions::new().write(true).open(path)?;
            Ok(file.set_len(random.below(size))?)
        }
        // A part of it is something else.
        2 => {
            let file = OpenOptions::new().write(true).open(path)?;
            let from = random.below(size) / 4096 * 4096;
            let zeros = vec![0; usize::try_from((size - from).min(4 * CHUNK))?];
            Ok(file.write_all_at(&zeros, from)?)
        }
        // A bit here and there.
        _ => {
            let file = OpenOptions::new().write(true).open(path)?;
            for _ in 0..1 + random.below(32) {
                let at = random.below(size);
                let byte = right[usize::try_from(at)?] ^ (1 << random.below(8));
                file.write_all_at(&[byte], at)?;
            }
            Ok(())
        }
    }
}

/// Makes the file right: where it lies, or as a new one.
fn repair(path: &Path, right: &[u8], in_place: bool) -> Result<()> {
    if in_place && path.exists() {
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(right, 0)?;
        return Ok(file.set_len(right.len() as u64)?);
    }
    let new = path.with_extension("new");
    let file = File::create(&new)?;
    file.write_all_at(right, 0)?;
    drop(file);
    Ok(fs::rename(&new, path)?)
}

/// One chunk after the other of the victim is wrong at every source: reads there have to
/// fail, until it is right again.
pub fn victim(scene: &Scene, reader: &mut Reader<'_>, device: &Path, made: &Made) {
    let size = made.image().len() as u64;
    let mut chunk = 0;
    while !scene.is_calm() {
        scene.sleep(Duration::from_millis(500 + reader.random.below(3000)));
        let offset = chunk % (size / CHUNK) * CHUNK;
        let len = usize::try_from(CHUNK).unwrap_or(0);
        chunk += 1;
        let at = offset + reader.random.below(CHUNK);
        let right = made.image()[usize::try_from(at).unwrap_or(0)];
        let put = |byte: u8| {
            for store in &scene.stores {
                let _guard = lock(&store.names);
                let path = store.backing.join(&made.published[0]);
                let file = OpenOptions::new().write(true).open(path);
                let written = file.and_then(|file| file.write_all_at(&[byte], at));
                report(scene, "changing the victim", written.map_err(Into::into));
            }
        };
        put(right ^ 0x20);
        scene.tally.corrupted.fetch_add(1, Relaxed);
        if reader.may_fail(device, made, offset, len) == Some(true) {
            scene.tally.refused.fetch_add(1, Relaxed);
        }
        put(right);
        scene.tally.repaired.fetch_add(1, Relaxed);
        reader.has_to_succeed(device, made, offset, len);
        if offset > 0 {
            reader.has_to_succeed(device, made, offset - CHUNK, len);
        }
    }
}
