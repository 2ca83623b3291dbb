//! Another program in this one's place: an upgrade while containers run.
//!
//! ```text
//! upgrade ──► admin: the new program looks at options and journal (`--check`)
//!                │ it accepts them                │ it does not: nothing happened
//!                ▼                                ▼
//!          main thread: nothing new is begun; what is under way is finished,
//!                for a moment; then execve
//!                ▼
//!          the new program, same process: recovers the devices
//! ```
//!
//! The process stays, so a supervisor notices nothing. Three files go with it: the
//! admin socket (clients that come meanwhile wait in it), the mount namespace in which
//! UFS is, and the lock of the run directory. All others, above all the devices, close
//! with the old program, and its threads and workers end.

use crate::lock::Lock;
use crate::paths::Paths;
use crate::protocol::Upgrading;
use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;
use rustix::process::{Pid, WaitOptions};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long the new program may look at options and journal.
const CHECK: Duration = Duration::from_secs(30);
/// How long requests of clients may take that have begun.
const CLIENTS: Duration = Duration::from_secs(2);
/// How long reads may take that have begun, while others wait.
pub const READS: Duration = Duration::from_millis(250);
/// How often a child is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// The hidden option with which a program takes over.
const OPTION: &str = "--inherited";
/// And that with which it only looks.
const CHECK_OPTION: &str = "--check";

/// Where an upgrade is asked for.
#[derive(Debug)]
pub struct Handover {
    wake: UnixStream,
    program: Mutex<Option<PathBuf>>,
    clients: AtomicUsize,
}

/// A client that is being answered.
#[derive(Debug)]
pub struct Client<'a>(&'a Handover);

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Relaxed);
    }
}

impl Handover {
    /// `wake` gets a byte when the main thread is to look.
    pub fn new(wake: UnixStream) -> Self {
        Self {
            wake,
            program: Mutex::default(),
            clients: AtomicUsize::new(0),
        }
    }

    /// Counts a client.
    pub fn client(&self) -> Client<'_> {
        self.clients.fetch_add(1, Relaxed);
        Client(self)
    }

    /// Waits for clients to be answered, but for one: who asked for this.
    pub fn await_clients(&self) {
        let since = Instant::now();
        while self.clients.load(Relaxed) > 1 && since.elapsed() < CLIENTS {
            thread::sleep(PAUSE / 10);
        }
    }

    /// Has the main thread put `program` in this one's place.
    pub fn ask(&self, program: &Path) -> Result<()> {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = Some(program.to_owned());
        (&self.wake)
            .write_all(&[1])
            .context("cannot wake the main thread")
    }

    /// What was asked for, once.
    pub fn take(&self) -> Option<PathBuf> {
        let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        program.take()
    }
}

/// The options that this program was started with.
fn options() -> Vec<OsString> {
    let mut options = Vec::new();
    let mut given = std::env::args_os().skip(1);
    while let Some(option) = given.next() {
        if option == OPTION {
            given.next();
        } else {
            options.push(option);
        }
    }
    options
}

/// Has `program` look whether it could go on here.
pub fn check(program: &Path) -> Result<Upgrading> {
    let failed = || {
        format!(
            "{} cannot take over; nothing was changed",
            program.display()
        )
    };
    if !program.is_absolute() {
        bail!("{}: its path is not absolute", failed());
    }
    let mut child = Command::new(program)
        .args(options())
        .arg(CHECK_OPTION)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(failed)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let heard = |stream: Option<&mut dyn Read>| {
        let mut text = Vec::new();
        // What does not fit into a pipe is of no interest.
        let _ = stream.map(|stream| stream.take(64 << 10).read_to_end(&mut text));
        String::from_utf8_lossy(&text).trim().to_owned()
    };
    let since = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().with_context(failed)? {
            break status;
        }
        if since.elapsed() > CHECK {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{}: it did not answer in {CHECK:?}", failed());
        }
        thread::sleep(PAUSE);
    };
    let mut stdout = stdout;
    let mut stderr = stderr;
    let version = heard(stdout.as_mut().map(|stream| stream as &mut dyn Read));
    if !status.success() {
        let said = heard(stderr.as_mut().map(|stream| stream as &mut dyn Read));
        bail!("{}: it ended with {status}: {said}", failed());
    }
    Ok(Upgrading {
        from: env!("CARGO_PKG_VERSION").to_owned(),
        to: version,
    })
}

/// Puts `program` in this one's place. Returns only if that fails.
pub fn become_program(
    program: &Path,
    listener: &UnixListener,
    host: &File,
    lock: &Lock,
) -> anyhow::Error {
    let files = [
        ("listener", listener.as_fd()),
        ("host", host.as_fd()),
        ("lock", lock.file().as_fd()),
    ];
    let keep = |fd: BorrowedFd<'_>| rustix::io::fcntl_setfd(fd, FdFlags::empty());
    if let Err(error) = files.iter().try_for_each(|(_, fd)| keep(*fd)) {
        return anyhow::Error::new(error).context("cannot pass files on");
    }
    let numbers = files.map(|(name, fd)| format!("{name}={}", fd.as_raw_fd()));
    let mut command = Command::new(program);
    command.args(options()).arg(OPTION).arg(numbers.join(","));
    let error = command.exec();
    anyhow::Error::new(error).context(format!("cannot run {}", program.display()))
}

/// What the program before has left to this one.
#[derive(Debug)]
pub struct Inherited {
    /// The admin socket.
    pub listener: UnixListener,
    /// The mount namespace in which UFS is.
    pub host: File,
    /// The lock of the run directory.
    pub lock: Lock,
}

impl Inherited {
    /// From the option's value. To be called before any file is opened.
    pub fn take(text: &str, paths: &Paths) -> Result<Self> {
        let number = |name: &str| -> Result<i32> {
            let mut pairs = text.split(',').filter_map(|pair| pair.split_once('='));
            let (_, number) = pairs
                .find(|(key, _)| *key == name)
                .with_context(|| format!("{OPTION} has no {name}"))?;
            number.parse().with_context(|| format!("{OPTION}: {name}"))
        };
        let numbers = [number("listener")?, number("host")?, number("lock")?];
        let [listener, host, lock] = numbers;
        if listener == host || host == lock || lock == listener {
            bail!("{OPTION}: a file comes twice");
        }
        let file = |number: i32| {
            let fd =
                accel_sys::inherited(number).with_context(|| format!("{OPTION}: file {number}"))?;
            rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
            anyhow::Ok(fd)
        };
        Ok(Self {
            listener: file(listener)?.into(),
            host: file(host)?.into(),
            lock: Lock::inherit(file(lock)?.into(), paths.daemon_lock()),
        })
    }
}

/// The children that the program before had: nobody else sees to their end. To be
/// called while there are no others.
pub fn adopt_children() -> Result<()> {
    let text = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok());
    let mut children: Vec<Pid> = pids.filter_map(Pid::from_raw).collect();
    if children.is_empty() {
        return Ok(());
    }
    let reap = move || {
        loop {
            children.retain(|pid| {
                matches!(
                    rustix::process::waitpid(Some(*pid), WaitOptions::NOHANG),
                    Ok(None)
                )
            });
            if children.is_empty() {
                return;
            }
            thread::sleep(Duration::from_secs(1));
        }
    };
    let thread = thread::Builder::new().name("reaper".to_owned());
    thread.spawn(reap).context("cannot start a thread")?;
    Ok(())
}

/// This program's path.
pub fn program() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_default();
    // So the kernel names a program that was replaced meanwhile.
    let text = path.as_os_str().as_encoded_bytes();
    match text.strip_suffix(b" (deleted)") {
        Some(path) => PathBuf::from(String::from_utf8_lossy(path).into_owned()),
        None => path.clone(),
    }
}
