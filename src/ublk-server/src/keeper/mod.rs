//! The connection keeper: a process that outlives the daemon.
//!
//! A FUSE connection ends when its last descriptor is closed. So a tiny process of
//! its own session keeps a duplicate of each; the daemon that dies does not take
//! them with it, and the next one is given them back.
//!
//! ```text
//! daemon ── Keep(root) + /dev/fuse ──► keeper ── Give(root) ──► the next daemon
//!        ── Drop(root) ─────────────►
//! ```
//!
//! The keeper is started when there is something to keep, and ends when there is
//! nothing: the last connection was dropped, or was unmounted while no daemon
//! served. If it dies under a living daemon, another is started and given
//! everything anew. It lies at `RUN_DIR/keeper.sock`; the journal, not the keeper,
//! knows what the connections are for.
//!
//! One line of JSON each way, as on the admin socket; requests follow each other on
//! one connection.

pub mod process;

use crate::protocol::Reply;
use crate::wire;
use accel_ufs::index::Root;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

/// How long the keeper may take to answer, or to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause before a keeper that died is replaced again, if that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What the daemon asks.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ask {
    /// Who are you, and what do you keep?
    List,
    /// Keep the descriptor that comes with this.
    Keep(Root),
    /// Give a duplicate of it.
    Give(Root),
    /// Close it.
    Drop(Root),
}

/// Answer to [`Ask::List`].
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    pid: i32,
    roots: Vec<Root>,
}

/// The daemon's end.
#[derive(Debug)]
pub struct Keeper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    state: Mutex<State>,
    /// Process id of the keeper, or zero: `status` waits for nobody.
    pid: AtomicI32,
    me: Weak<Self>,
}

#[derive(Debug, Default)]
struct State {
    /// Everything that is to be kept.
    held: HashMap<Root, OwnedFd>,
    process: Option<Process>,
    /// Of the last process.
    number: u64,
}

#[derive(Debug)]
struct Process {
    stream: UnixStream,
    pid: Pid,
    /// Becomes readable when the process has ended.
    pidfd: OwnedFd,
    /// If it is ours to reap.
    child: Option<Child>,
    number: u64,
}

impl Keeper {
    /// The keeper at `socket`. Nothing is started yet.
    pub fn new(socket: PathBuf) -> Self {
        let shared = Arc::new_cyclic(|me| Shared {
            socket,
            state: Mutex::default(),
            pid: AtomicI32::new(0),
            me: Weak::clone(me),
        });
        Self { shared }
    }

    /// Has a duplicate of `fd` kept under the name `root`.
    pub fn keep(&self, root: Root, fd: &OwnedFd) -> Result<()> {
        let fd = fd.try_clone().context("cannot duplicate a connection")?;
        let mut state = self.shared.lock();
        state.held.insert(root, fd);
        self.shared.send_all(&mut state, Some(root))
    }

    /// Has it closed. When nothing is left, waits for the keeper to end.
    pub fn release(&self, root: Root) {
        let mut state = self.shared.lock();
        state.held.remove(&root);
        let Some(process) = &mut state.process else {
            return;
        };
        if let Err(error) = process.ask::<()>(Ask::Drop(root), None) {
            // The thread that watches it starts another.
            tracing::debug!(
                error = format!("{error:#}"),
                "the connection keeper is gone"
            );
        }
        if state.held.is_empty()
            && let Some(process) = state.process.take()
        {
            // With the lock: on its way out it removes the socket, which must not
            // be that of the next one.
            self.shared.pid.store(0, Relaxed);
            process.await_end();
        }
    }

    /// Takes over what the keeper of an earlier daemon has, if there is one. It
    /// goes on keeping it.
    pub fn take_over(&self) -> Result<HashMap<Root, OwnedFd>> {
        let mut state = self.shared.lock();
        let Ok(stream) = UnixStream::connect(&self.shared.socket) else {
            return Ok(HashMap::new());
        };
        let (mut process, kept) = match Process::new(stream, None, state.number + 1) {
            Ok(found) => found,
            Err(error) => {
                // It keeps nothing any more and was on its way out.
                tracing::debug!(error = format!("{error:#}"), "a connection keeper ended");
                return Ok(HashMap::new());
            }
        };
        let mut connections = HashMap::new();
        for root in kept.roots {
            let fd = process.ask_for_fd(root)?;
            connections.insert(root, fd.try_clone()?);
            state.held.insert(root, fd);
        }
        self.shared.watch(&mut state, process)?;
        Ok(connections)
    }

    /// Process id of the keeper, if there is one.
    pub fn pid(&self) -> Option<i32> {
        Some(self.shared.pid.load(Relaxed)).filter(|pid| *pid != 0)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the keeper the connection of `new`, or all of them if it is new
    /// itself.
    fn send_all(&self, state: &mut State, new: Option<Root>) -> Result<()> {
        let State { held, process, .. } = &mut *state;
        if let (Some(process), Some(root)) = (process, new)
            && process.ask::<()>(Ask::Keep(root), held.get(&root)).is_ok()
        {
            return Ok(());
        }
        let mut process = self.start(state.number + 1)?;
        for (root, fd) in &state.held {
            process.ask::<()>(Ask::Keep(*root), Some(fd))?;
        }
        self.watch(state, process)
    }

    /// Starts a keeper.
    fn start(&self, number: u64) -> Result<Process> {
        // One that is there has died, or has begun to end and lets nobody in.
        let _ = fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket)
            .with_context(|| format!("cannot listen at {}", self.socket.display()))?;
        let child = Command::new("/proc/self/exe")
            .arg("keep-connections")
            .arg(&self.socket)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .context("cannot start the connection keeper")?;
        let stream = UnixStream::connect(&self.socket)
            .context("cannot reach the connection keeper that was just started")?;
        Ok(Process::new(stream, Some(child), number)?.0)
    }

    /// Uses `process` from now on, and starts another when it dies.
    fn watch(&self, state: &mut State, process: Process) -> Result<()> {
        let pidfd = process.pidfd.try_clone()?;
        let (number, me) = (process.number, Weak::clone(&self.me));
        self.pid.store(process.pid.as_raw_nonzero().get(), Relaxed);
        state.number = number;
        if let Some(before) = state.process.replace(process) {
            drop(before.stream);
            reap(before.child);
        }
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                await_end(&pidfd, None);
                while let Some(shared) = me.upgrade() {
                    match shared.died(number) {
                        Ok(()) => return,
                        Err(error) => {
                            tracing::error!(
                                error = format!("{error:#}"),
                                "exports would not survive this daemon now; trying again"
                            );
                        }
                    }
                    drop(shared);
                    thread::sleep(PAUSE);
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    /// The keeper with this number has ended: start another, if it is needed.
    fn died(&self, number: u64) -> Result<()> {
        let mut state = self.lock();
        if state.number != number {
            return Ok(());
        }
        if let Some(process) = state.process.take() {
            reap(process.child);
        }
        if state.held.is_empty() {
            return Ok(());
        }
        tracing::warn!("the connection keeper ended; starting another");
        self.send_all(&mut state, None)
    }
}

impl Process {
    fn new(stream: UnixStream, child: Option<Child>, number: u64) -> Result<(Self, Kept)> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        wire::send(&stream, &Ask::List, None)?;
        let (reply, _) = wire::receive::<Reply<Kept>>(&stream)
            .context("the connection keeper does not answer")?;
        let kept = answer(reply)?;
        let pid = Pid::from_raw(kept.pid).context("the connection keeper has no process id")?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .context("cannot watch the connection keeper")?;
        let process = Self {
            stream,
            pid,
            pidfd,
            child,
            number,
        };
        Ok((process, kept))
    }

    fn ask<T: DeserializeOwned>(&mut self, ask: Ask, fd: Option<&OwnedFd>) -> Result<T> {
        wire::send(&self.stream, &ask, fd)?;
        answer(wire::receive(&self.stream)?.0)
    }

    fn ask_for_fd(&mut self, root: Root) -> Result<OwnedFd> {
        wire::send(&self.stream, &Ask::Give(root), None)?;
        let (reply, fd) = wire::receive::<Reply<()>>(&self.stream)?;
        answer(reply)?;
        fd.context("the connection keeper gave no descriptor")
    }

    /// It keeps nothing any more, and ends by itself.
    fn await_end(self) {
        drop(self.stream);
        if !await_end(&self.pidfd, Some(PATIENCE)) {
            tracing::warn!(
                pid = self.pid.as_raw_nonzero(),
                "the connection keeper does not end"
            );
        }
        reap(self.child);
    }
}

fn answer<T>(reply: Reply<T>) -> Result<T> {
    match reply {
        Reply::Ok(answer) => Ok(answer),
        Reply::Error(error) | Reply::Again(error) => bail!(error),
    }
}

/// Waits until the process has ended; false if it has not.
fn await_end(pidfd: &OwnedFd, limit: Option<Duration>) -> bool {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    loop {
        let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn reap(child: Option<Child>) {
    if let Some(mut child) = child {
        // It has ended, or nobody waits for it.
        let _ = child.try_wait();
    }
}
