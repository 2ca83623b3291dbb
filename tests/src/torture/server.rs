//! A real NFS server goes away and comes back, its files are damaged and mounted anew,
//! under running readers. Two daemons: one has nothing but the NFS mount, the other a
//! replica as well. Readers wait, or go on from the replica; no error, no wrong byte.
//! Meanwhile commands are run all the time, and the daemon is asked for its status without
//! one; how long that takes is printed. To start a program takes an emulated machine longer
//! than all the rest: `status` by the socket is what the daemon itself takes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{Advice, fadvise};

use super::images::{self, Made};
use super::node::{Node, Serve, raise};
use crate::nfs::{Mode, Server};
use crate::random::Random;
use crate::{Setting, daemon, drop_caches};

/// No answer takes as long; only a bound for what hangs.
const HANG: Duration = Duration::from_secs(300);
/// What a command may take while the server is down. Even an emulated machine answers within
/// a second, unless it is busy.
const ANSWER: Duration = Duration::from_secs(20);

const BY_SOCKET: &str = "status by the socket";

/// One daemon with a mounted image and a reader.
struct Site<'a> {
    name: &'static str,
    node: Node,
    root: PathBuf,
    other: PathBuf,
    images: &'a [Made],
    /// Whether it has a replica.
    replica: bool,
    reads: AtomicU64,
    longest_read: AtomicU64,
    phase: &'a Mutex<&'static str>,
    answers: Mutex<Vec<(&'static str, &'static str, Duration)>>,
}

/// Runs it with a server that is down for `down`.
///
/// # Errors
/// When anything is wrong; the table of answer times is printed in any case.
pub fn run(setting: &Setting, mode: Mode, down: Duration) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let at = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    let (export, replica, ufs) = (at("export")?, at("replica")?, at("ufs")?);
    let mkfs = setting.bin.join("mkfs-accel");
    let images = (0..2)
        .map(|number| images::make(&mkfs, &export, scratch.path(), 5, number, 8 << 20))
        .collect::<Result<Vec<_>>>()?;
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([export.join("."), replica.clone()])
        .status()?;
    ensure!(copied.success(), "cp failed");
    let mut server = Server::start(&export)?;
    server.mount(&ufs, mode)?;
    let phase = Mutex::new("up");
    let site = |name: &'static str, sources: Vec<PathBuf>| -> Result<Site<'_>> {
        let directory = at(name)?;
        let (root, other) = (directory.join("root"), directory.join("other"));
        fs::create_dir(&root)?;
        fs::create_dir(&other)?;
        Ok(Site {
            name,
            replica: sources.len() > 1,
            node: Node::start(Serve {
                program: setting.ublk_server(),
                sources,
                transport: setting.transport.clone(),
                directory,
                further: Vec::new(),
            })?,
            root,
            other,
            images: &images,
            reads: AtomicU64::new(0),
            longest_read: AtomicU64::new(0),
            phase: &phase,
            answers: Mutex::default(),
        })
    };
    let sites = [
        site("alone", vec![ufs.clone()])?,
        site("with-replica", vec![ufs.clone(), replica])?,
    ];
    let result = play(&sites, &mut server, (&export, &ufs), mode, down, &phase);
    for site in &sites {
        site.report();
    }
    let ended = sites.iter().try_for_each(|site| match &result {
        Ok(()) => site.take_down(),
        Err(_) => {
            println!("--- log of {}\n{}", site.name, site.node.log(30));
            site.node.end();
            Ok(())
        }
    });
    if result.is_err() {
        super::sweep(scratch.path());
    }
    result.and(ended)
}

fn play(
    sites: &[Site<'_>],
    server: &mut Server,
    (export, ufs): (&Path, &Path),
    mode: Mode,
    down: Duration,
    phase: &Mutex<&'static str>,
) -> Result<()> {
    let enter = |name: &'static str| {
        println!("nfs: {name}");
        *phase.lock().unwrap_or_else(PoisonError::into_inner) = name;
    };
    for site in sites {
        site.ask(
            "mount",
            &[&site.images[0].digest, &site.root.to_string_lossy()],
        )?;
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for site in sites {
            let over = &over;
            threads.push(scope.spawn(move || site.read_on(over)));
            threads.push(scope.spawn(move || site.ask_on(over)));
            threads.push(scope.spawn(move || site.ask_directly(over)));
        }
        let progress = |sites: &[&Site<'_>], reads: u64| -> Result<()> {
            let since = Instant::now();
            let before: Vec<_> = sites.iter().map(|site| site.reads.load(Relaxed)).collect();
            loop {
                let mut now = sites.iter().zip(&before);
                if now.all(|(site, before)| site.reads.load(Relaxed) >= before + reads) {
                    return Ok(());
                }
                if threads.iter().any(|thread| thread.is_finished()) {
                    bail!("a reader has ended");
                }
                ensure!(
                    since.elapsed() < HANG,
                    "readers do not go on within {HANG:?}"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        let [alone, both] = sites else {
            bail!("two sites");
        };
        let acted = (|| -> Result<()> {
            progress(&[alone, both], 20)?;
            enter("server down");
            drop_caches()?;
            server.down()?;
            let since = Instant::now();
            // One goes on from the replica.
            progress(&[both], 20)?;
            while since.elapsed() < down {
                std::thread::sleep(Duration::from_millis(100));
                if threads.iter().any(|thread| thread.is_finished()) {
                    bail!("a reader has ended");
                }
            }
            enter("server up again");
            server.up()?;
            progress(&[alone, both], 20)?;

            enter("cable cut");
            server.cut()?;
            progress(&[both], 5)?;
            std::thread::sleep(down / 4);
            server.mend()?;
            enter("cable mended");
            progress(&[alone, both], 5)?;

            // What has a replica does not notice; what has none waits.
            enter("files removed");
            let image = &sites[0].images[0];
            let moved = export.join("moved");
            fs::rename(export.join("layers"), &moved)?;
            drop_caches()?;
            progress(&[both], 20)?;
            enter("files back");
            fs::rename(&moved, export.join("layers"))?;
            progress(&[alone, both], 20)?;

            enter("mounted anew");
            server.unmount(ufs)?;
            server.mount(ufs, mode)?;
            drop_caches()?;
            progress(&[alone, both], 20)?;
            over.store(true, Relaxed);
            for thread in &threads {
                while !thread.is_finished() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            damaged(both, export, image, &enter)
        })();
        over.store(true, Relaxed);
        // Nobody may wait for ever.
        let _ = server.mend();
        let _ = server.up();
        // What ended a reader says more than that it has ended.
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        }
        acted
    })?;
    for site in sites {
        let answers = site
            .answers
            .lock()
            .map_err(|_| anyhow::anyhow!("poisoned"))?;
        for (command, phase, took) in &*answers {
            ensure!(
                *took < ANSWER,
                "{}: {command} took {took:?} ({phase})",
                site.name
            );
        }
    }
    Ok(())
}

/// Flipped bytes and a file cut short, with a replica: not noticed.
fn damaged(
    site: &Site<'_>,
    export: &Path,
    image: &Made,
    enter: &dyn Fn(&'static str),
) -> Result<()> {
    enter("bytes flipped");
    let path = export.join(&image.published[0]);
    let right = image.image();
    let file = OpenOptions::new().write(true).open(&path)?;
    for (number, byte) in right.iter().enumerate().step_by(64 << 10) {
        file.write_all_at(&[byte ^ 1], number as u64)?;
    }
    drop_caches()?;
    site.round(&mut Random::new(3), 30)?;
    enter("cut short");
    file.set_len(right.len() as u64 / 3)?;
    drop_caches()?;
    site.round(&mut Random::new(4), 30)?;
    enter("removed");
    fs::remove_file(&path)?;
    drop_caches()?;
    site.round(&mut Random::new(5), 30)?;
    let status = site.node.status()?;
    ensure!(status["failed_reads"] == 0, "failed reads: {status}");
    fs::write(&path, right)?;
    Ok(())
}

impl Site<'_> {
    fn phase(&self) -> &'static str {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn took(&self, what: &'static str, phase: &'static str, since: Instant) {
        if let Ok(mut answers) = self.answers.lock() {
            answers.push((what, phase, since.elapsed()));
        }
    }

    fn ask(&self, command: &'static str, arguments: &[&str]) -> Result<()> {
        let phase = self.phase();
        let since = Instant::now();
        let output = self.node.client([&[command], arguments].concat())?;
        self.took(command, phase, since);
        ensure!(
            output.status.success(),
            "{}, {phase}: {command} {} failed: {}",
            self.name,
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Asks everything that has to be answered at any time.
    fn ask_on(&self, over: &AtomicBool) -> Result<()> {
        let other = self.other.to_string_lossy();
        while !over.load(Relaxed) {
            for command in ["list", "status"] {
                self.ask(command, &[])?;
            }
            let phase = self.phase();
            // Without any source nothing new can be mounted.
            if self.replica || phase.starts_with("up") {
                match self.ask("mount", &[&self.images[1].digest, &other]) {
                    // The only source went away meanwhile.
                    Err(_) if !self.replica && self.phase() != phase => continue,
                    mounted => mounted?,
                }
                self.ask("unmount", &[&other])?;
            }
            std::thread::sleep(Duration::from_millis(700));
        }
        Ok(())
    }

    /// Asks for the status by the socket.
    fn ask_directly(&self, over: &AtomicBool) -> Result<()> {
        let socket = self.node.socket();
        while !over.load(Relaxed) {
            let (phase, since) = (self.phase(), Instant::now());
            daemon::ask(&socket, &serde_json::json!({"op": "status"}))
                .with_context(|| format!("{}, {phase}: asking for the status", self.name))?;
            self.took(BY_SOCKET, phase, since);
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    }

    fn read_on(&self, over: &AtomicBool) -> Result<()> {
        let mut random = Random::new(11);
        while !over.load(Relaxed) {
            self.round(&mut random, 1)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Reads of files of the mounted image, compared with what they have to be.
    fn round(&self, random: &mut Random, times: u64) -> Result<()> {
        let files = &self.images[0].files;
        for _ in 0..times {
            let known = &files[usize::try_from(random.below(files.len() as u64))?];
            let path = self.root.join(&known.name);
            let phase = self.phase();
            let context = || format!("{}, {phase}: reading {}", self.name, path.display());
            let since = Instant::now();
            let file = File::open(&path).with_context(context)?;
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            let offset = random.below(known.size);
            let len = usize::try_from((known.size - offset).min(256 << 10))?;
            let (mut found, mut wanted) = (vec![0; len], vec![0; len]);
            known.fill(offset, &mut wanted);
            file.read_exact_at(&mut found, offset)
                .with_context(context)?;
            raise(&self.longest_read, since.elapsed());
            ensure!(found == wanted, "{}: WRONG BYTES", context());
            self.reads.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Prints how long commands took, by phase.
    fn report(&self) {
        let Ok(answers) = self.answers.lock() else {
            return;
        };
        println!(
            "nfs: {}: {} reads, longest {} ms",
            self.name,
            self.reads.load(Relaxed),
            self.longest_read.load(Relaxed)
        );
        let mut rows: Vec<(&str, &str)> = Vec::new();
        for (command, phase, _) in &*answers {
            if !rows.contains(&(phase, command)) {
                rows.push((phase, command));
            }
        }
        for (phase, command) in rows {
            let took = answers
                .iter()
                .filter(|answer| (answer.1, answer.0) == (phase, command));
            let mut took: Vec<_> = took.map(|answer| answer.2.as_millis()).collect();
            took.sort_unstable();
            println!(
                "nfs: {:<13} {phase:<16} {command:<20} {:>4} times, median {:>5} ms, longest {:>6} ms",
                self.name,
                took.len(),
                took[took.len() / 2],
                took[took.len() - 1]
            );
        }
    }

    fn take_down(&self) -> Result<()> {
        self.ask("unmount", &[&self.root.to_string_lossy()])?;
        let status = self.node.status()?;
        ensure!(
            status["exports"].as_array().is_some_and(Vec::is_empty),
            "exports are left: {status}"
        );
        self.node.stop()
    }
}
