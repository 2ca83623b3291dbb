//! The daemon under torture with its supervisor, and its clients.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// How a daemon is started.
#[derive(Debug, Clone)]
pub struct Serve {
    /// `ublk-server`.
    pub program: PathBuf,
    /// UFS, then its replicas.
    pub sources: Vec<PathBuf>,
    /// `ublk` or `fuse`.
    pub transport: String,
    /// Where socket, run directory and log lie.
    pub directory: PathBuf,
    /// Further words.
    pub further: Vec<String>,
}

/// The daemon and what restarts it.
#[derive(Debug)]
pub struct Node {
    serve: Serve,
    child: Mutex<Child>,
    /// From a kill to its death, at most, in milliseconds.
    pub slowest_death: AtomicU64,
    /// From a start to the first answer, at most, in milliseconds.
    pub slowest_start: AtomicU64,
}

impl Node {
    /// Starts the daemon and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(serve: Serve) -> Result<Self> {
        let child = Mutex::new(spawn(&serve)?);
        let node = Self {
            serve,
            child,
            slowest_death: AtomicU64::new(0),
            slowest_start: AtomicU64::new(0),
        };
        node.await_answer(Duration::from_secs(120))?;
        Ok(node)
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Waits until it answers; how long that took since this call.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn await_answer(&self, limit: Duration) -> Result<Duration> {
        let since = Instant::now();
        // It listens once it has recovered. A client would be a program to start, which
        // takes an emulated machine long.
        while UnixStream::connect(self.socket()).is_err() {
            ensure!(
                since.elapsed() < limit,
                "the daemon does not answer within {limit:?}\n{}",
                self.log(30)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let took = since.elapsed();
        raise(&self.slowest_start, took);
        Ok(took)
    }

    /// SIGKILL, then a successor. Does not wait for that to answer.
    ///
    /// # Errors
    /// When it cannot be started, or had ended before it was killed.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.child();
        let ended = child.try_wait()?;
        let since = Instant::now();
        child.kill()?;
        child.wait()?;
        raise(&self.slowest_death, since.elapsed());
        *child = spawn(&self.serve)?;
        drop(child);
        ensure!(
            ended.is_none(),
            "the daemon had ended by itself: {ended:?}\n{}",
            self.log(30)
        );
        Ok(())
    }

    /// Restarts it if it has ended by itself, which is an error.
    ///
    /// # Errors
    /// Then.
    pub fn supervise(&self) -> Result<()> {
        let mut child = self.child();
        if let Some(status) = child.try_wait()? {
            *child = spawn(&self.serve)?;
            drop(child);
            anyhow::bail!("the daemon ended by itself: {status}\n{}", self.log(30));
        }
        Ok(())
    }

    /// The processes that read UFS for it.
    pub fn workers(&self) -> Vec<u32> {
        let pid = self.pid();
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        let tasks = tasks.into_iter().flatten().flatten();
        let children =
            tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children = children.flat_map(|text| {
            let pids = text.split_whitespace().map(str::parse::<u32>);
            pids.flatten().collect::<Vec<_>>()
        });
        let is_worker = |pid: &u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words
                .split(|byte| *byte == 0)
                .any(|word| word == b"source-worker")
        };
        let mut workers: Vec<u32> = children.filter(is_worker).collect();
        workers.sort_unstable();
        workers
    }

    /// A client command: the subcommand, then its arguments.
    pub fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut words = words.into_iter();
        let mut command = Command::new(&self.serve.program);
        command
            .args(words.next())
            .arg("--socket")
            .arg(self.socket())
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a client command.
    ///
    /// # Errors
    /// When it cannot be run at all.
    pub fn client<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        Ok(self.command(words).output()?)
    }

    /// Its admin socket.
    pub fn socket(&self) -> PathBuf {
        self.serve.directory.join("socket")
    }

    /// What `status` says.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<serde_json::Value> {
        let output = self.client(["status", "--json"])?;
        ensure!(output.status.success(), "status: {output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Ends it with SIGTERM and waits.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn stop(&self) -> Result<()> {
        let mut child = self.child();
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&child),
            rustix::process::Signal::TERM,
        )?;
        let since = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "the daemon ended with {status}");
                break;
            }
            if since.elapsed() > Duration::from_secs(120) {
                child.kill()?;
                anyhow::bail!("the daemon did not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let left = fs::read_dir(self.serve.directory.join("socket.d/journal"));
        let left: Vec<_> = match left {
            Ok(left) => left.flatten().map(|entry| entry.file_name()).collect(),
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        ensure!(left.is_empty(), "journal entries are left: {left:?}");
        Ok(())
    }

    /// Kills it for good.
    pub fn end(&self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// The end of its log.
    pub fn log(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.serve.directory.join("log")).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// Makes a figure at least as large as this time.
pub fn raise(figure: &AtomicU64, time: Duration) {
    figure.fetch_max(u64::try_from(time.as_millis()).unwrap_or(u64::MAX), Relaxed);
}

fn spawn(serve: &Serve) -> Result<Child> {
    let log = serve.directory.join("log");
    // The log of a night fills no disk.
    if fs::metadata(&log).is_ok_and(|log| log.len() > 32 << 20) {
        fs::rename(&log, serve.directory.join("log.old"))?;
    }
    let log = File::options().create(true).append(true).open(&log)?;
    let (ufs, replicas) = serve.sources.split_first().context("no sources")?;
    let mut command = Command::new(&serve.program);
    command.arg("serve").arg("--ufs").arg(ufs);
    for replica in replicas {
        command.arg("--replica").arg(replica);
    }
    command
        .arg("--socket")
        .arg(serve.directory.join("socket"))
        .args(["--cache-size", "16M", "--transport", &serve.transport])
        .args(&serve.further)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", serve.program.display()))
}

/// `/sys/block/NAME/inflight` of a ublk device: reads that the kernel has issued and
/// that are not answered.
pub fn in_flight(device: &Path) -> Option<u64> {
    let name = device.file_name()?.to_str()?;
    let text = fs::read_to_string(format!("/sys/block/{name}/inflight")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}
