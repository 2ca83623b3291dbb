//! The doctor of a node: every fault is injected into one that is well, is found, and is gone
//! when what the doctor says has been done to the node.

use accel_client::protocol::{CacheStatus, SourceStatus, Status as ServerStatus};
use accel_oci::{DiffId, Digest};
use accel_snapshotter::doctor::node::{self, Asked, Node, Running, Support};
use accel_snapshotter::doctor::{Finding, Level, Step};
use accel_snapshotter::status::{LayerStatus, Status};
use accel_ufs::index::Root;
use std::collections::BTreeMap;
use std::path::Path;

/// What is done to a node.
type Change = fn(&mut Node);

fn server() -> ServerStatus {
    ServerStatus {
        disk_cache: None,
        remake: None,
        pid: 1,
        version: "1.0".to_owned(),
        program: "/usr/local/bin/ublk-server".into(),
        ufs: "/mnt/ufs".into(),
        transport: "ublk".to_owned(),
        transport_reason: String::new(),
        keeper: None,
        verifies: true,
        fetched_bytes: 0,
        cache: CacheStatus {
            size: 1,
            used: 0,
            hits: 0,
            misses: 0,
            joined: 0,
            evicted: 0,
        },
        sources: vec![SourceStatus {
            name: "ufs".to_owned(),
            state: String::new(),
            in_use: true,
            set_aside: 0,
            worker: None,
            workers: 1,
            dying: 0,
            reads: 0,
            operations: 0,
            bytes: 0,
            failed_attempts: 0,
        }],
        failed_reads: 0,
        exports: Vec::new(),
        holders: Vec::new(),
    }
}

fn snapshotter() -> Status {
    Status {
        pid: 2,
        version: "1.0".to_owned(),
        root: "/r".into(),
        server: "/run/ublk.sock".into(),
        ufs: None,
        snapshots: 0,
        hits: 0,
        fallbacks: 0,
        fallback_reasons: BTreeMap::new(),
        used_chain_ids: None,
        layers: Vec::new(),
        unpacked: Vec::new(),
    }
}

fn well() -> Node {
    Node {
        release: "6.12.1".to_owned(),
        erofs: Support::Present,
        overlay: Support::Present,
        fuse: Support::Present,
        ublk: Support::Present,
        loops: Support::Present,
        version: "1.0",
        server: Asked {
            socket: "/run/ublk.sock".into(),
            answer: Ok(server()),
        },
        snapshotter: Asked {
            socket: "/run/accel.sock".into(),
            answer: Ok(snapshotter()),
        },
        access: Some((0, 0o600)),
        containerd: Asked {
            socket: "/run/containerd.sock".into(),
            answer: Ok(Running {
                version: "1.7.24".to_owned(),
                knows_us: true,
            }),
        },
        udev: Some(true),
        nvidia: None,
    }
}

fn inject(change: impl FnOnce(&mut Node)) -> Vec<Finding> {
    let mut node = well();
    change(&mut node);
    let bad = node::examine(&node).into_iter();
    bad.filter(|finding| finding.level != Level::Ok).collect()
}

/// Whether a person is told to do this.
fn tells(finding: &Finding, words: &str) -> bool {
    let tells = |step: &Step| matches!(step, Step::Do(what) if what.contains(words));
    finding.mend.iter().any(tells)
}

/// What a command of a step does to a node. A command that is not here is unknown.
fn perform(node: &mut Node, command: &str) {
    match command {
        "modprobe ublk_drv" => node.ublk = Support::Present,
        "modprobe erofs" => node.erofs = Support::Present,
        "modprobe overlay" => node.overlay = Support::Present,
        "systemctl restart ublk-server" => node.server.answer = Ok(server()),
        "systemctl restart accel-snapshotter" => node.snapshotter.answer = Ok(snapshotter()),
        "systemctl restart containerd" => node.containerd = well().containerd,
        "chown root:root /run/accel.sock" => {
            node.access = node.access.map(|(_, mode)| (0, mode));
        }
        "chmod 600 /run/accel.sock" => {
            node.access = node.access.map(|(owner, _)| (owner, 0o600));
        }
        "udevadm control --reload" => {}
        _ if command.starts_with("echo ") || command.starts_with("systemctl enable ") => {}
        other => panic!("what does {other:?} do?"),
    }
}

#[test]
fn a_node_that_is_well_is_well() {
    assert_eq!(inject(|_| {}), []);
}

#[test]
fn udev_needs_no_rules_where_there_are_no_block_devices() {
    let over_fuse: Change = |node| {
        server_status(node).transport = "fuse".to_owned();
        node.ublk = Support::Absent;
    };
    let nodes: [(Change, Option<bool>); 3] =
        [(over_fuse, Some(false)), (over_fuse, None), (|_| {}, None)];
    for (change, udev) in nodes {
        let bad = inject(|node| {
            change(node);
            node.udev = udev;
        });
        assert!(
            bad.iter().all(|finding| finding.check != "udev"),
            "{bad:#?}"
        );
    }
}

#[test]
fn the_rules_for_udev_come_with_the_project() {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/udev");
    assert!(rules.join(node::UDEV_RULES).is_file());
}

#[test]
fn faults_of_a_node_are_mended_by_the_commands() {
    let injected: [(&str, Level, Change); 12] = [
        ("kernel", Level::Warning, |node| {
            node.erofs = Support::Loadable;
        }),
        ("kernel", Level::Warning, |node| {
            node.overlay = Support::Loadable;
        }),
        ("ublk", Level::Fault, |node| node.ublk = Support::Loadable),
        ("ublk", Level::Warning, |node| {
            node.server.answer.as_mut().unwrap().transport = "fuse".to_owned();
        }),
        ("ublk-server", Level::Fault, |node| {
            node.server.answer = Err("no such file".to_owned());
        }),
        ("ublk-server", Level::Warning, |node| {
            node.server.answer.as_mut().unwrap().version = "0.9".to_owned();
        }),
        ("snapshotter", Level::Fault, |node| {
            node.snapshotter.answer = Err("no such file".to_owned());
        }),
        ("snapshotter", Level::Warning, |node| {
            node.snapshotter.answer.as_mut().unwrap().version = "0.9".to_owned();
        }),
        ("snapshotter", Level::Fault, |node| {
            node.access = Some((0, 0o666));
        }),
        ("snapshotter", Level::Fault, |node| {
            node.access = Some((1000, 0o600));
        }),
        ("containerd", Level::Fault, |node| {
            node.containerd.answer.as_mut().unwrap().knows_us = false;
        }),
        ("containerd", Level::Fault, |node| {
            node.containerd.answer = Err("no such file".to_owned());
        }),
    ];
    for (check, level, change) in injected {
        let bad = inject(change);
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert_eq!((bad[0].check, bad[0].level), (check, level), "{bad:#?}");
        let left = inject(|node| {
            change(node);
            for step in &bad[0].mend {
                if let Step::Run(command) = step {
                    perform(node, command);
                }
            }
        });
        assert_eq!(left, [], "{check}");
    }
}

fn status(node: &mut Node) -> &mut Status {
    node.snapshotter.answer.as_mut().unwrap()
}

fn server_status(node: &mut Node) -> &mut ServerStatus {
    node.server.answer.as_mut().unwrap()
}

#[test]
fn faults_that_people_mend_are_mended_by_what_is_said() {
    let boot: Change = |node| {
        node.release = "6.12.1".to_owned();
        node.erofs = Support::Present;
        node.overlay = Support::Present;
        node.ublk = Support::Present;
    };
    // The fault, the words that say what is to be done, and what that does.
    let injected: [(&str, Level, Change, &str, Change); 15] = [
        (
            "kernel",
            Level::Fault,
            |node| node.erofs = Support::Absent,
            "boot a kernel that has it",
            boot,
        ),
        (
            "kernel",
            Level::Fault,
            |node| node.overlay = Support::Absent,
            "boot a kernel that has it",
            boot,
        ),
        (
            "ublk",
            Level::Warning,
            |node| node.ublk = Support::Absent,
            "boot Linux 6.5 or later with CONFIG_BLK_DEV_UBLK",
            boot,
        ),
        (
            "ublk",
            Level::Fault,
            |node| {
                node.ublk = Support::Absent;
                node.fuse = Support::Absent;
            },
            "boot a kernel with ublk",
            boot,
        ),
        (
            "ublk",
            Level::Fault,
            |node| {
                node.ublk = Support::Absent;
                node.loops = Support::Absent;
                node.release = "6.1.0".to_owned();
            },
            "boot a kernel with either",
            boot,
        ),
        (
            "udev",
            Level::Warning,
            |node| node.udev = Some(false),
            "install deploy/udev/59-image-accel.rules",
            |node| node.udev = Some(true),
        ),
        (
            "ublk-server",
            Level::Fault,
            |node| server_status(node).verifies = false,
            "install a release build",
            |node| node.server.answer = Ok(server()),
        ),
        (
            "ublk-server",
            Level::Warning,
            |node| server_status(node).version = "0.9".to_owned(),
            "install the same version of both",
            |node| node.server.answer = Ok(server()),
        ),
        (
            "ufs",
            Level::Fault,
            |node| {
                server_status(node).sources[0].in_use = false;
                server_status(node).sources[0].state = "does not answer".to_owned();
            },
            "see that it is mounted and answers: findmnt --target /mnt/ufs; ls /mnt/ufs/layers",
            |node| server_status(node).sources[0].in_use = true,
        ),
        (
            "ufs",
            Level::Warning,
            |node| {
                let mut second = server_status(node).sources[0].clone();
                second.in_use = false;
                server_status(node).sources.push(second);
            },
            "see that it is mounted and answers",
            |node| server_status(node).sources[1].in_use = true,
        ),
        (
            "snapshotter",
            Level::Fault,
            |node| status(node).server = "/other".into(),
            "start it with --server /run/ublk.sock",
            |node| status(node).server = "/run/ublk.sock".into(),
        ),
        (
            "snapshotter",
            Level::Fault,
            |node| status(node).ufs = Some("/mnt/other".into()),
            "give both the same --ufs",
            |node| status(node).ufs = Some("/mnt/ufs".into()),
        ),
        (
            "lazy-layers",
            Level::Fault,
            |node| {
                status(node).layers.push(LayerStatus {
                    diff_id: DiffId(Digest::of(b"layer")),
                    root: Root([1; 32]),
                    size: 4096,
                    point: "/r/layers/1".into(),
                    mounted: false,
                    snapshots: 1,
                    users: 0,
                    trust: "manifest".to_owned(),
                });
            },
            "they are mounted as soon as ublk-server and UFS answer",
            |node| status(node).layers[0].mounted = true,
        ),
        (
            "fallbacks",
            Level::Warning,
            |node| status(node).fallbacks = 3,
            "`accel-snapshotter status` says which and why",
            // They are counted since the start.
            |node| node.snapshotter.answer = Ok(snapshotter()),
        ),
        (
            "runtime-handler",
            Level::Fault,
            |node| node.nvidia = Some(false),
            "install NVIDIA's container toolkit",
            |node| node.nvidia = Some(true),
        ),
    ];
    for (check, level, change, words, mend) in injected {
        let bad = inject(change);
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert_eq!((bad[0].check, bad[0].level), (check, level), "{bad:#?}");
        assert!(tells(&bad[0], words), "{words:?}: {:#?}", bad[0]);
        let left = inject(|node| {
            change(node);
            mend(node);
        });
        assert_eq!(left, [], "{check}, after {words:?}");
    }
}
