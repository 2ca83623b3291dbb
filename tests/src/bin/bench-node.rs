//! Measures the node daemon: what readers notice of its succession, and many devices.
//! `tools/bench-recovery` and `tools/bench-many` run it. Everything that is read is
//! compared with what was published.

use accel_tests::daemon::{Daemon, Succession, ask};
use accel_tests::fixture::{self, Layer};
use accel_tests::random::Random;
use accel_tests::{Setting, fail};
use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use rustix::fs::OFlags;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Measures ublk-server on this machine, as root; prints Markdown
#[derive(Debug, Parser)]
struct Arguments {
    /// Directory of the programs
    #[arg(long, value_name = "DIR")]
    bin: PathBuf,
    /// UFS directory with the images of tools/lib/node_layers.py; beside it a file
    /// TAG.digest for each
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// ublk or fuse
    #[arg(long)]
    transport: String,
    /// Where temporary files go
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// How long reads wait while a daemon follows another
    Recovery {
        /// Successions of each kind
        #[arg(long, default_value_t = 30)]
        rounds: usize,
        /// Readers at a time
        #[arg(long, default_value_t = 8)]
        readers: usize,
    },
    /// Many devices at once
    Many {
        /// How many
        #[arg(long, default_value_t = 500)]
        devices: usize,
    },
    /// Devices that come, are read and go, one after the other
    Cycles {
        /// How often
        #[arg(long, default_value_t = 1000)]
        rounds: usize,
    },
}

const BLOCK: usize = 4096;

/// A buffer that O_DIRECT takes.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let at = bytes.as_ptr().align_offset(BLOCK);
        Self(bytes, at)
    }

    fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

fn open_direct(path: &Path) -> Result<File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Of values in microseconds, the one below which this many thousandths of them lie, in
/// milliseconds.
fn quantile(values: &mut [u64], thousandths: usize) -> String {
    values.sort_unstable();
    let at = (values.len().saturating_sub(1) * thousandths).div_ceil(1000);
    let value = values.get(at).copied().unwrap_or(0);
    format!("{}.{}", value / 1000, value % 1000 / 100)
}

fn digest(ufs: &Path, tag: &str) -> Result<String> {
    let path = ufs.with_file_name(format!("{tag}.digest"));
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// What the readers of [`recovery`] share. Times are microseconds since one moment.
struct Readers {
    began: Instant,
    over: AtomicBool,
    /// When the daemon was killed last.
    event: AtomicU64,
    /// When the first read ended that was begun after that.
    first: AtomicU64,
    /// Per reader: the longest wait since the round began, and reads.
    longest: Vec<AtomicU64>,
    reads: Vec<AtomicUsize>,
}

impl Readers {
    fn now(&self) -> u64 {
        micros(self.began.elapsed())
    }

    fn read(&self, number: usize, device: &Path, expected: &[u8]) -> Result<()> {
        let file = open_direct(device)?;
        let mut random = Random::new(number as u64);
        let mut buffer = Aligned::new(BLOCK);
        let blocks = (expected.len() / BLOCK) as u64;
        while !self.over.load(Relaxed) {
            let at = random.below(blocks) * BLOCK as u64;
            let start = self.now();
            let bytes = buffer.bytes(BLOCK);
            file.read_exact_at(bytes, at)
                .with_context(|| format!("reading at {at}"))?;
            let end = self.now();
            let from = usize::try_from(at)?;
            ensure!(
                bytes == &expected[from..from + BLOCK],
                "wrong bytes at {at}"
            );
            self.longest[number].fetch_max(end - start, Relaxed);
            self.reads[number].fetch_add(1, Relaxed);
            if start >= self.event.load(Relaxed) {
                self.first.fetch_min(end, Relaxed);
            }
        }
        Ok(())
    }
}

/// Reads of each reader between two successions.
const BETWEEN: usize = 20;

fn recovery(setting: &Setting, ufs: &Path, rounds: usize, count: usize) -> Result<()> {
    let image = digest(ufs, "big")?;
    let layer = fixture::layers(ufs, &image)?.remove(0);
    let expected = fs::read(&layer.erofs)?;
    let daemon = Daemon::start(setting, ufs)?;
    let device = daemon.attach(&image)?.remove(0);
    let readers = Readers {
        began: Instant::now(),
        over: AtomicBool::new(false),
        event: AtomicU64::new(u64::MAX),
        first: AtomicU64::new(u64::MAX),
        longest: (0..count).map(|_| AtomicU64::new(0)).collect(),
        reads: (0..count).map(|_| AtomicUsize::new(0)).collect(),
    };
    let kinds = [
        (Succession::Kill, "SIGKILL, started again"),
        (Succession::Terminate, "SIGTERM, started again"),
        (Succession::Upgrade, "`ublk-server upgrade`"),
    ];
    let mut waits = vec![Vec::new(); kinds.len()];
    let mut firsts = vec![Vec::new(); kinds.len()];
    let total = std::thread::scope(|scope| -> Result<usize> {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let (readers, device, expected) = (&readers, &device, &expected);
                scope.spawn(move || readers.read(number, device, expected))
            })
            .collect();
        let more = || -> Result<()> {
            let seen: Vec<_> = readers
                .reads
                .iter()
                .map(|reads| reads.load(Relaxed))
                .collect();
            let started = Instant::now();
            while readers
                .reads
                .iter()
                .zip(&seen)
                .any(|(reads, seen)| reads.load(Relaxed) < seen + BETWEEN)
            {
                ensure!(
                    !threads.iter().any(|thread| thread.is_finished()),
                    "a reader failed"
                );
                ensure!(
                    started.elapsed() < Duration::from_secs(120),
                    "readers wait for ever"
                );
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        };
        let measured = (|| -> Result<()> {
            more()?;
            // In turn, so that what else the machine does falls on all alike.
            for _ in 0..rounds {
                for (kind, (succession, _)) in kinds.iter().enumerate() {
                    for longest in &readers.longest {
                        longest.store(0, Relaxed);
                    }
                    readers.event.store(u64::MAX, Relaxed);
                    readers.first.store(u64::MAX, Relaxed);
                    let mut at = 0;
                    daemon.succeed(*succession, || {
                        at = readers.now();
                        readers.event.store(at, Relaxed);
                    })?;
                    more()?;
                    waits[kind].extend(readers.longest.iter().map(|wait| wait.load(Relaxed)));
                    firsts[kind].push(readers.first.load(Relaxed).saturating_sub(at));
                }
            }
            Ok(())
        })();
        readers.over.store(true, Relaxed);
        for thread in threads {
            thread.join().map_err(|_| fail("a reader panicked"))??;
        }
        measured?;
        Ok(readers.reads.iter().map(|reads| reads.load(Relaxed)).sum())
    })
    .with_context(|| daemon.log())?;
    println!(
        "| {} | successions | longest wait of a reader: p50 | p99.9 | to the first byte: p50 | longest |",
        setting.transport
    );
    println!("|---|---|---|---|---|---|");
    for (kind, (_, name)) in kinds.iter().enumerate() {
        let (waits, firsts) = (&mut waits[kind], &mut firsts[kind]);
        println!(
            "| {name} | {rounds} | {} ms | {} ms | {} ms | {} ms |",
            quantile(waits, 500),
            quantile(waits, 999),
            quantile(firsts, 500),
            quantile(firsts, 1000)
        );
    }
    println!("\n{count} readers, {total} reads of 4 KiB, all right; no error.");
    daemon.detach(&image)?;
    daemon.stop()
}

fn attach(socket: &Path, layer: &Layer) -> Result<PathBuf> {
    let request = serde_json::json!({"op": "attach", "image": layer.diff_id, "holder": null});
    let answer = ask(socket, &request)?;
    let path = answer["layers"][0]["device"]["path"].as_str();
    Ok(PathBuf::from(path.context("it is no block device")?))
}

fn detach(socket: &Path, layer: &Layer) -> Result<()> {
    let request = serde_json::json!({"op": "detach", "holder": {"operator": layer.diff_id}});
    ask(socket, &request).map(drop)
}

/// What the daemon has.
#[derive(Debug, Clone, Copy)]
struct Resources {
    /// Resident memory, kilobytes.
    memory: u64,
    /// How much of it is the cache's, kilobytes.
    cache: u64,
    threads: u64,
    files: usize,
}

impl Resources {
    /// As columns of a table.
    fn columns(&self) -> String {
        let (all, cache) = (self.memory >> 10, self.cache >> 10);
        format!(
            "{all} MiB | {cache} MiB | {} | {}",
            self.threads, self.files
        )
    }
}

fn resources(pid: u32) -> Result<Resources> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.with_context(|| format!("no {name}"))?.parse()?)
    };
    let files = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok(Resources {
        memory: field("VmRSS:")?,
        cache: field("RssShmem:")?,
        threads: field("Threads:")?,
        files,
    })
}

/// The same once there are as few threads as there were: those that answered who asked
/// last may be counted a moment longer.
fn settled(pid: u32, idle_threads: u64) -> Result<Resources> {
    let started = Instant::now();
    loop {
        let found = resources(pid)?;
        if found.threads == idle_threads || started.elapsed() > Duration::from_secs(30) {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn same(device: &Path, layer: &Layer) -> Result<()> {
    let expected = fs::read(&layer.erofs)?;
    let mut buffer = Aligned::new(expected.len());
    let bytes = buffer.bytes(expected.len());
    open_direct(device)?.read_exact_at(bytes, 0)?;
    ensure!(bytes == expected, "{} has wrong bytes", device.display());
    Ok(())
}

fn devices_left() -> Result<usize> {
    let names = fs::read_dir("/dev")?
        .flatten()
        .map(|entry| entry.file_name());
    Ok(names
        .filter(|name| name.to_string_lossy().starts_with("ublkc"))
        .count())
}

fn many(setting: &Setting, ufs: &Path, count: usize) -> Result<()> {
    ensure!(setting.transport == "ublk", "this is about block devices");
    let layers = fixture::layers(ufs, &digest(ufs, "many")?)?;
    ensure!(
        layers.len() >= count,
        "the image has {} layers",
        layers.len()
    );
    let layers = &layers[..count];
    let before = devices_left()?;
    let daemon = Daemon::start(setting, ufs)?;
    let (socket, pid) = (daemon.socket(), daemon.pid());
    // The first one loads what then stays.
    attach(&socket, &layers[0])?;
    detach(&socket, &layers[0])?;
    let idle = resources(pid)?;
    println!(
        "| devices | attach: p50 | p99 | resident | of it cached data | threads | open files |"
    );
    println!("|---|---|---|---|---|---|---|");
    println!("| 0 | – | – | {} |", idle.columns());
    let (mut devices, mut times) = (Vec::new(), Vec::new());
    for (number, layer) in (1..).zip(layers) {
        let start = Instant::now();
        devices.push(attach(&socket, layer)?);
        times.push(micros(start.elapsed()));
        if number % 100 == 0 || number == count || number == 10 {
            let found = settled(pid, idle.threads)?;
            ensure!(found.threads == idle.threads, "{} threads", found.threads);
            println!(
                "| {number} | {} ms | {} ms | {} |",
                quantile(&mut times.clone(), 500),
                quantile(&mut times.clone(), 990),
                found.columns()
            );
        }
    }
    let start = Instant::now();
    for (device, layer) in devices.iter().zip(layers) {
        same(device, layer)?;
    }
    println!(
        "\nAll {count} read in full and compared: {:.1} s.",
        start.elapsed().as_secs_f64()
    );
    // Killed and recovered, with all of them.
    let start = Instant::now();
    daemon.kill()?;
    let died = start.elapsed();
    daemon.start_again()?;
    println!(
        "Killed: dead after {:.1} s; the next one serves all {:.1} s later.",
        died.as_secs_f64(),
        (start.elapsed() - died).as_secs_f64()
    );
    for (device, layer) in devices.iter().zip(layers).step_by(25) {
        same(device, layer)?;
    }
    let pid = daemon.pid();
    let mut times = Vec::new();
    for layer in layers {
        let start = Instant::now();
        detach(&socket, layer)?;
        times.push(micros(start.elapsed()));
    }
    println!(
        "Detached: p50 {} ms, p99 {} ms each.",
        quantile(&mut times.clone(), 500),
        quantile(&mut times, 990)
    );
    ensure!(
        devices_left()? == before,
        "{} devices are left",
        devices_left()?
    );
    let left = settled(pid, idle.threads)?;
    println!(
        "Then {} MiB resident, {} MiB of it cached data, {} threads, {} open files; no device is left.",
        left.memory >> 10,
        left.cache >> 10,
        left.threads,
        left.files
    );
    ensure!(
        (left.threads, left.files) == (idle.threads, idle.files),
        "something is left"
    );
    let together = &layers[..count.min(50)];
    let start = Instant::now();
    let devices: Vec<_> = std::thread::scope(|scope| {
        let attach = |layer| {
            let socket = &socket;
            scope.spawn(move || attach(socket, layer))
        };
        let threads: Vec<_> = together.iter().map(attach).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| fail("a thread panicked"))?)
            .collect::<Result<_>>()
    })?;
    println!(
        "{} attached at the same moment: {:.2} s until the last.",
        together.len(),
        start.elapsed().as_secs_f64()
    );
    for (device, layer) in devices.iter().zip(together) {
        same(device, layer)?;
        detach(&socket, layer)?;
    }
    let hundred = digest(ufs, "hundred")?;
    let start = Instant::now();
    let mounted = daemon.mount(&hundred)?;
    let took = start.elapsed().as_secs_f64();
    let entries = fs::read_dir(mounted.path())?.count();
    ensure!(entries == 101, "{entries} entries");
    let last = fs::read_to_string(mounted.path().join("last"))?;
    ensure!(last == "99", "the top layer is not on top: {last}");
    println!("An image of 100 layers: mounted in {took:.2} s.");
    mounted.unmount()?;
    ensure!(
        devices_left()? == before,
        "{} devices are left",
        devices_left()?
    );
    daemon.stop()
}

/// Attaches, reads and detaches two layers in turn, and sees to it that nothing of any of
/// them is left.
fn cycles(setting: &Setting, ufs: &Path, rounds: usize) -> Result<()> {
    /// Until what stays for good is there: memory that is used again, threads' stacks.
    const FIRST: usize = 50;
    ensure!(setting.transport == "ublk", "this is about block devices");
    let layers = fixture::layers(ufs, &digest(ufs, "many")?)?;
    ensure!(layers.len() > 1, "the image has no two layers");
    let before = devices_left()?;
    let daemon = Daemon::start(setting, ufs)?;
    let (socket, pid) = (daemon.socket(), daemon.pid());
    let (mut attached, mut compared, mut detached) = (Vec::new(), Vec::new(), Vec::new());
    let mut cycle = |number: usize| -> Result<()> {
        let layer = &layers[number % 2];
        let start = Instant::now();
        let device = attach(&socket, layer)?;
        attached.push(micros(start.elapsed()));
        let start = Instant::now();
        same(&device, layer)?;
        compared.push(micros(start.elapsed()));
        let start = Instant::now();
        detach(&socket, layer)?;
        detached.push(micros(start.elapsed()));
        ensure!(
            devices_left()? == before,
            "{} devices are left after {number} rounds",
            devices_left()?
        );
        Ok(())
    };
    (0..FIRST).try_for_each(&mut cycle)?;
    // Who answered the last requests is still counted for a moment.
    let mut idle = u64::MAX;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        idle = idle.min(resources(pid)?.threads);
    }
    let first = settled(pid, idle)?;
    let start = Instant::now();
    for number in 0..rounds {
        cycle(number)?;
        if (number + 1) % 100 == 0 {
            let seconds = start.elapsed().as_secs_f64();
            eprintln!("{} of {rounds} after {seconds:.0} s", number + 1);
        }
    }
    let took = start.elapsed().as_secs_f64();
    println!("| {rounds} times | p50 | p99 |");
    println!("|---|---|---|");
    for (what, times) in [
        ("attach", &mut attached),
        ("read and compare", &mut compared),
        ("detach", &mut detached),
    ] {
        println!(
            "| {what} | {} ms | {} ms |",
            quantile(times, 500),
            quantile(times, 990)
        );
    }
    let last = settled(pid, first.threads)?;
    println!(
        "\n{took:.0} s. Resident {} → {} MiB, threads {} → {}, open files {} → {}; no device is left.",
        first.memory >> 10,
        last.memory >> 10,
        first.threads,
        last.threads,
        first.files,
        last.files
    );
    ensure!(
        (last.threads, last.files) == (first.threads, first.files),
        "something is left"
    );
    // The cache holds the two layers, and grows no more; a kilobyte for each round would
    // be a leak of everything that there is of an export.
    let grown = last.memory.saturating_sub(first.memory);
    ensure!(
        grown <= rounds as u64 + 2048,
        "{grown} KiB more are resident"
    );
    daemon.stop()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let ufs = arguments.ufs.canonicalize()?;
    let setting = Setting {
        bin: arguments.bin.canonicalize()?,
        fixtures: ufs.clone(),
        transport: arguments.transport,
        scratch: arguments.scratch.canonicalize()?,
    };
    match arguments.what {
        What::Recovery { rounds, readers } => recovery(&setting, &ufs, rounds, readers),
        What::Many { devices } => many(&setting, &ufs, devices),
        What::Cycles { rounds } => cycles(&setting, &ufs, rounds),
    }
}
