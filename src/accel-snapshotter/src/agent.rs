//! `accel-snapshotter agent`: says on UFS which layers this node uses, so that nobody deletes
//! them.
//!
//! A process of its own: it writes to UFS, and one that waits for a file system that does not
//! answer cannot be ended. Neither containers nor pulls wait for it. When it is gone for long
//! everything counts as used that the node had mounted (`accel_ufs::node`).

use crate::canary::HOLDER;
use crate::layers::holders;
use crate::service;
use crate::status::Status;
use crate::ufs_place::UfsPlace;
use crate::watch;
use accel_client::protocol::{Command, ExportStatus, Status as Served};
use accel_client::wire;
use accel_ufs::index::Root;
use accel_ufs::node::{NodeLease, NodeName, RENEWAL, SETTLE};
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often to look.
const LOOK: Duration = Duration::from_secs(3);
/// How long the snapshotter, and then `ublk-server`, may take to say what there is.
const QUESTION: Duration = Duration::from_secs(2);
// What a node uses is said in time although neither answers, and there is some left for UFS.
const _: () = assert!(LOOK.as_secs() + 2 * QUESTION.as_secs() + 2 < SETTLE.as_secs());

/// What `agent` was told.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// UFS is a file system that is mounted there, or at this directory above: while none is,
    /// the node cannot serve, and nothing is written to what is there instead
    #[arg(long, value_name = "MOUNT POINT", num_args = 0..=1, require_equals = true)]
    must_be_mounted: Option<Option<PathBuf>>,
    /// What the node is called in its cluster
    #[arg(long, value_name = "NAME")]
    node: String,
    /// What the cluster is called on UFS: the UID of its namespace kube-system
    #[arg(long, value_name = "ID")]
    cluster: String,
    /// The snapshotter's socket
    #[arg(long, value_name = "PATH", default_value = crate::settings::LISTEN)]
    socket: PathBuf,
    /// Check every five seconds whether this node can serve, with a device of its own, and
    /// write into this local file what came of it, for `accel-controller node`
    #[arg(long, value_name = "FILE")]
    health: Option<PathBuf>,
}

/// Layers by the root of their image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Use {
    used: BTreeSet<Root>,
    held: BTreeSet<Root>,
}

impl Use {
    /// As if a container ran on every layer that the node has mounted.
    fn of_all_held(&self) -> Self {
        Self {
            used: self.held.clone(),
            held: self.held.clone(),
        }
    }

    /// From what the snapshotter says, and what is exported.
    fn with(snapshotter: &Status, exports: &[ExportStatus]) -> Self {
        let ours = holders(&snapshotter.root);
        let mut all = Self::default();
        for layer in &snapshotter.layers {
            all.held.insert(layer.root);
            if layer.users > 0 {
                all.used.insert(layer.root);
            }
        }
        for export in exports {
            if export.holders == [HOLDER] {
                continue;
            }
            all.held.insert(export.root);
            // What is mounted by hand is used.
            if export
                .holders
                .iter()
                .any(|holder| !holder.starts_with(&ours))
            {
                all.used.insert(export.root);
            }
        }
        all
    }
}

/// Works until the process ends.
pub fn run(options: &Options) -> Result<()> {
    let name = NodeName::new(&options.cluster, &options.node).context(
        "--cluster is of letters, digits, - and _, and --node is a node's name as Kubernetes has it",
    )?;
    let ufs = UfsPlace {
        path: options.ufs.clone(),
        mount_point: options
            .must_be_mounted
            .clone()
            .map(|point| point.unwrap_or_else(|| options.ufs.clone())),
    };
    if let Some(file) = &options.health {
        let file = std::path::absolute(file)?;
        watch::start(options.socket.clone(), ufs.clone(), name.clone(), file)?;
    }
    say_all(&options.socket, &ufs, &name)
}

fn say_all(socket: &Path, ufs: &UfsPlace, name: &NodeName) -> Result<()> {
    let runtime = service::runtime()?;
    let look = || {
        let asked = service::ask_status(socket.to_owned(), QUESTION);
        let snapshotter = runtime.block_on(asked)?;
        let served = served(&snapshotter.server)?;
        Ok::<_, anyhow::Error>(Use::with(&snapshotter, &served.exports))
    };
    let mut lease: Option<NodeLease> = None;
    let mut said: Option<(Use, Instant)> = None;
    let mut known: Option<Use> = None;
    // What goes wrong is told when it begins, not every time.
    let mut wrong = String::new();
    loop {
        let seen = look();
        // Containers start although `ublk-server` or the snapshotter does not answer here:
        // until they do, everything counts as used that the node had.
        let now = match &seen {
            Ok(now) => Some(now.clone()),
            Err(_) => known.as_ref().map(Use::of_all_held),
        };
        let mut say = |now: Use| {
            let fresh = said
                .as_ref()
                .is_some_and(|(last, at)| *last == now && at.elapsed() < RENEWAL);
            if !fresh {
                let lease = match &mut lease {
                    Some(lease) => lease,
                    none => none.insert(NodeLease::open(ufs.open()?, name.clone())?),
                };
                lease.say(now.used.clone(), now.held.clone())?;
                said = Some((now, Instant::now()));
            }
            Ok::<_, anyhow::Error>(())
        };
        let told = now.map_or(Ok(()), &mut say);
        if told.is_err() {
            // UFS may have been mounted anew.
            lease = None;
            said = None;
        }
        let outcome = seen.map(|seen| known = Some(seen)).and(told);
        match outcome {
            Ok(()) if !wrong.is_empty() => {
                tracing::info!("it is known again what this node uses");
                wrong.clear();
            }
            Ok(()) => {}
            Err(error) => {
                let error = format!("{error:#}");
                if wrong != error {
                    tracing::warn!(error, "cannot say what this node uses");
                    wrong = error;
                }
            }
        }
        thread::sleep(LOOK);
    }
}

fn served(server: &Path) -> Result<Served> {
    wire::ask_within(server, &Command::Status, QUESTION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn all_that_a_node_has_may_be_used_while_it_is_not_known() {
        let known = Use {
            used: BTreeSet::from([Root([1; 32])]),
            held: BTreeSet::from([Root([1; 32]), Root([2; 32])]),
        };
        let assumed = known.of_all_held();
        assert_eq!((&assumed.used, &assumed.held), (&known.held, &known.held));
    }

    #[test]
    fn what_containers_run_on_is_used_and_what_is_mounted_by_hand() {
        let root = |number: u8| Root([number; 32]);
        let layer = |number: u8, users: usize| {
            json!({"diff_id": format!("sha256:{}", "0".repeat(64)), "root": root(number).to_string(),
                "size": 4096, "point": "/p", "mounted": true, "snapshots": 1, "users": users, "trust": "manifest"})
        };
        let snapshotter: Status = serde_json::from_value(json!({
            "pid": 1, "version": "", "root": "/r", "server": "/s", "snapshots": 2, "hits": 0,
            "fallbacks": 0, "fallback_reasons": {}, "layers": [layer(1, 2), layer(2, 0)], "unpacked": [],
        }))
        .unwrap();
        let export = |number: u8, holders: &[&str]| {
            json!({"name": "n", "root": root(number).to_string(), "size": 4096,
                "device": {"transport": "fuse", "served": true}, "trust": "manifest", "holders": holders, "hits": 0,
                "misses": 0, "served_bytes": 0, "source_bytes": 0, "errors": 0})
        };
        let exports = json!([
            export(1, &["accel-snapshotter /r 01"]),
            export(2, &["accel-snapshotter /r 02"]),
            export(3, &["/mnt/by-hand"]),
            export(4, &["accel-snapshotter /other 04"]),
            export(5, &[HOLDER]),
        ]);
        let exports: Vec<ExportStatus> = serde_json::from_value(exports).unwrap();
        let found = Use::with(&snapshotter, &exports);
        let roots = |numbers: &[u8]| numbers.iter().map(|number| root(*number)).collect();
        let expected = Use {
            used: roots(&[1, 3, 4]),
            held: roots(&[1, 2, 3, 4]),
        };
        assert_eq!(found, expected);
    }
}
