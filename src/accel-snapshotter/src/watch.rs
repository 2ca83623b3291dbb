//! Finds out for the agent whether its node can serve, with a canary, and ends the agent without
//! leaving that behind.

use crate::canary::{NodeCanary, Places};
use crate::health::{Failure, Verdict, Watched};
use crate::service;
use crate::ufs_place::UfsPlace;
use accel_oci::ChainId;
use accel_ufs::node::NodeName;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How often it is checked whether the node can serve.
const CHECK: Duration = Duration::from_secs(5);
/// How soon after a result that nobody had expected.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a check may take. At worst a check has just gone well; then it takes CHECK,
/// ANSWER, AGAIN and ANSWER until it is known that the node cannot serve: 18 s, and who tells
/// the cluster and who takes the label away look every few seconds.
const ANSWER: Duration = Duration::from_secs(6);
/// How long the agent may take to end: it takes its canary away.
const END: Duration = Duration::from_secs(3);

/// Checks the node again and again on a thread of its own, and writes into `file` what came of
/// it. `socket`: the snapshotter's. From now on SIGTERM ends the process here.
///
/// # Errors
/// No thread can be started.
pub fn start(socket: PathBuf, ufs: UfsPlace, node: NodeName, file: PathBuf) -> Result<()> {
    let shared = Arc::default();
    let watch = Watch {
        socket,
        ufs,
        node,
        file,
        shared: Arc::clone(&shared),
    };
    spawn("health", move || watch.run())?;
    spawn("end", move || shared.end_when_told())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread.spawn(work).context("cannot start a thread")?;
    Ok(())
}

/// Finds out again and again whether the node can serve, and writes that down.
struct Watch {
    socket: PathBuf,
    ufs: UfsPlace,
    node: NodeName,
    file: PathBuf,
    shared: Arc<Shared>,
}

/// What has to be known when the agent ends.
#[derive(Default)]
struct Shared {
    ending: AtomicBool,
    /// Where the canary is, if there may be one.
    places: Mutex<Option<Places>>,
    /// What the snapshotter has said is used, if it has said so since that was written.
    used: Mutex<Option<BTreeSet<ChainId>>>,
}

impl Watch {
    fn run(&self) {
        let mut verdict = Verdict::resume(&self.file);
        let mut watched = Watched::<NodeCanary>::new();
        let mut wrong = String::new();
        while !self.shared.ending.load(Relaxed) {
            let was = verdict.said().healthy;
            let checked = watched.check(self.check(), ANSWER);
            if self.shared.ending.load(Relaxed) {
                // The canary may have been taken from it.
                return;
            }
            verdict.observe(checked);
            verdict.uses(self.shared.take_used());
            let said = verdict.said();
            if said.healthy != was {
                tracing::info!(healthy = said.healthy, "{}", said.message);
            }
            let written = verdict.write(&self.file);
            let now = written.map_or_else(|error| error.to_string(), |()| String::new());
            if now != wrong && !now.is_empty() {
                tracing::warn!(error = now, "nobody can know how this node is");
            }
            wrong = now;
            thread::sleep(match verdict.is_unsure() {
                true => AGAIN,
                false => CHECK,
            });
        }
    }

    /// A node can serve if its snapshotter answers, and `ublk-server`, whichever that
    /// has, gives what is on UFS.
    fn check(&self) -> impl FnOnce(&mut NodeCanary) -> Result<(), Failure> + Send + 'static {
        let (socket, ufs) = (self.socket.clone(), self.ufs.clone());
        let (node, shared) = (self.node.clone(), Arc::clone(&self.shared));
        let find = move || {
            let asked = service::ask_status(socket, ANSWER);
            let status = service::runtime()?.block_on(asked)?;
            shared.uses(status.used_chain_ids);
            let server = status.server;
            let places = Places { ufs, node, server };
            shared.found(&places)?;
            Ok(places)
        };
        move |canary| {
            let of_node = |error: anyhow::Error| Failure::of_node(format!("{error:#}"));
            let places = find().map_err(of_node)?;
            let server = places.server.clone();
            canary.check(places).map_err(|error| Failure {
                why: format!("{error:#}"),
                // Without that one nothing is known of UFS.
                ufs_unread: UnixStream::connect(server).is_ok(),
            })
        }
    }
}

impl Shared {
    fn used(&self) -> MutexGuard<'_, Option<BTreeSet<ChainId>>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what is used. Whether the check goes on well does not matter to that.
    fn uses(&self, used: Option<BTreeSet<ChainId>>) {
        if used.is_some() {
            *self.used() = used;
        }
    }

    fn take_used(&self) -> Option<BTreeSet<ChainId>> {
        self.used().take()
    }

    /// Notes where there will be a canary.
    fn found(&self, places: &Places) -> Result<()> {
        let mut known = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ending.load(Relaxed) {
            bail!("the agent ends");
        }
        *known = Some(places.clone());
        Ok(())
    }

    /// Ends the process on SIGTERM, without leaving a canary if that can be done soon.
    fn end_when_told(&self) {
        let told = async {
            let mut told = signal(SignalKind::terminate())?;
            told.recv().await;
            Ok::<_, anyhow::Error>(())
        };
        if let Err(error) = service::runtime().and_then(|runtime| runtime.block_on(told)) {
            tracing::warn!(error = format!("{error:#}"), "will leave its canary behind");
            return;
        }
        self.ending.store(true, Relaxed);
        let known = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = known.clone() {
            let (sender, done) = mpsc::channel();
            let cleared = spawn("clear", move || {
                let _ = sender.send(places.clear());
            });
            let cleared = cleared.and_then(|()| done.recv_timeout(END).context("no answer")?);
            if let Err(error) = cleared {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "leaves its canary, which the next agent removes"
                );
            }
        }
        std::process::exit(0);
    }
}
