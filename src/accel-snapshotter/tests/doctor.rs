//! The doctor: every fault is injected into a configuration or node that is well, is
//! found, and is gone when what the doctor says has been done to the files.

use accel_client::protocol::{CacheStatus, SourceStatus, Status as ServerStatus};
use accel_oci::{DiffId, Digest};
use accel_snapshotter::config::{self, Containerd, Scope, Wanted};
use accel_snapshotter::doctor::containerd::{Configuration, File, examine, scope};
use accel_snapshotter::doctor::node::{self, Asked, Node, Running, Support};
use accel_snapshotter::doctor::{Finding, Level, Step};
use accel_snapshotter::edit;
use accel_snapshotter::status::{LayerStatus, Status};
use accel_ufs::index::Root;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const MAIN: &str = "config.toml";

/// A node's files, on disk: what is applied to them is applied as TOML.
struct Etc {
    directory: tempfile::TempDir,
    version: Containerd,
    scope: Scope,
    maps_ids: bool,
    root: &'static Path,
}

impl Etc {
    fn new(version: &str, scope: Scope) -> Self {
        let etc = Self {
            directory: tempfile::tempdir().unwrap(),
            version: version.parse().unwrap(),
            scope,
            maps_ids: true,
            root: Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.accel"),
        };
        fs::create_dir(etc.path("conf.d")).unwrap();
        etc.write(MAIN, &config::stanza(&etc.wanted()).unwrap());
        etc
    }

    fn wanted(&self) -> Wanted<'static> {
        Wanted {
            version: self.version,
            scope: self.scope,
            socket: Path::new("/run/accel/snapshotter.sock"),
            root: self.root,
            local_pull: false,
            maps_ids: self.maps_ids,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn replace(&self, old: &str, new: &str) {
        let text = self.text(MAIN);
        assert!(text.contains(old), "{old:?} is not in {text}");
        self.write(MAIN, &text.replace(old, new));
    }

    fn file(path: &Path) -> File {
        File {
            path: path.to_owned(),
            table: fs::read_to_string(path)
                .unwrap_or_default()
                .parse()
                .unwrap(),
        }
    }

    fn read(&self) -> Configuration {
        let main = Self::file(&self.path(MAIN));
        let mut names: Vec<_> = fs::read_dir(self.path("conf.d"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "toml"))
            .collect();
        names.sort();
        let others: Vec<_> = names.iter().map(|path| Self::file(path)).collect();
        match main.table.contains_key("imports") {
            true => Configuration {
                files: [vec![main], others].concat(),
                stray: Vec::new(),
            },
            false => Configuration {
                files: vec![main],
                stray: others,
            },
        }
    }

    fn findings(&self) -> Vec<Finding> {
        examine(&self.read(), &self.wanted())
    }

    /// The doctor finds this, says how to mend it, and all is well when that is done.
    fn is_mended(&self, check: &str, level: Level) {
        let findings = self.findings();
        let finding = findings.iter().find(|finding| finding.check == check);
        let finding = finding.unwrap_or_else(|| panic!("no {check} in {findings:#?}"));
        assert_eq!(finding.level, level, "{finding:?}");
        for finding in &findings {
            assert!(!finding.mend.is_empty(), "nothing mends {finding:?}");
            edit::apply(&finding.mend).unwrap();
        }
        self.is_well();
    }

    /// The doctor finds this, and says with these words what a person has to do.
    fn says(&self, check: &str, level: Level, words: &str) {
        let findings = self.findings();
        let found = |finding: &&Finding| finding.check == check && finding.level == level;
        let finding = findings.iter().find(found);
        let finding = finding.unwrap_or_else(|| panic!("no {check} in {findings:#?}"));
        let says = |step: &Step| matches!(step, Step::Do(what) if what.contains(words));
        assert!(finding.mend.iter().any(says), "{words:?}: {finding:#?}");
    }

    fn is_well(&self) {
        let findings = self.findings();
        let well = findings.iter().all(|finding| finding.level == Level::Ok);
        assert!(well, "{findings:#?}\n{}", self.text(MAIN));
    }
}

const VERSIONS: [&str; 4] = ["1.6.20", "1.7.24", "2.0.5", "2.1.9"];

fn scopes(version: &str) -> Vec<Scope> {
    match version {
        "1.6.20" => vec![Scope::Default],
        _ => vec![Scope::Default, Scope::RuntimeClass, Scope::Nvidia],
    }
}

#[test]
fn what_config_prints_is_well() {
    for version in VERSIONS {
        for scope in scopes(version) {
            Etc::new(version, scope).is_well();
        }
    }
}

#[test]
fn without_anything_of_ours_everything_is_added() {
    for version in VERSIONS {
        for scope in scopes(version) {
            for main in [
                "",
                "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause\"\n",
            ] {
                let etc = Etc::new(version, scope);
                etc.write(MAIN, main);
                etc.is_mended("proxy-plugin", Level::Fault);
                assert!(main.is_empty() || etc.text(MAIN).contains("pause"));
            }
        }
    }
}

#[test]
fn another_address_is_seen() {
    let etc = Etc::new("1.7", Scope::Default);
    etc.replace("snapshotter.sock", "other.sock");
    etc.is_mended("proxy-plugin", Level::Fault);
}

#[test]
fn annotations_switched_off_are_seen() {
    for version in ["1.6", "1.7", "2.0"] {
        let etc = Etc::new(version, Scope::Default);
        etc.replace(
            "disable_snapshot_annotations = false",
            "disable_snapshot_annotations = true",
        );
        etc.is_mended("annotations", Level::Fault);
    }
    let etc = Etc::new("2.1", Scope::Default);
    etc.replace("enable_remote_snapshot_annotations = \"true\"", "");
    etc.is_mended("annotations", Level::Fault);
}

#[test]
fn a_missing_runtime_handler_is_seen() {
    for version in ["1.7", "2.0", "2.1"] {
        let etc = Etc::new(version, Scope::RuntimeClass);
        etc.replace("runtimes.runc-accel", "runtimes.runc-other");
        etc.is_mended("runtime-handler", Level::Fault);
        if version == "1.7" {
            // Without any other, 1.7 has no default runtime.
            let etc = Etc::new(version, Scope::RuntimeClass);
            etc.replace("runtimes.runc]", "other]");
            etc.is_mended("runtime-handler", Level::Fault);
            assert!(etc.text(MAIN).contains("runc]") || etc.text(MAIN).contains("runc."));
        }
        // One that has the snapshotter of all others.
        let etc = Etc::new(version, Scope::RuntimeClass);
        etc.replace(
            "runtime_type = \"io.containerd.runc.v2\"\n  snapshotter = \"accel\"",
            "runtime_type = \"io.containerd.runc.v2\"",
        );
        etc.is_mended("runtime-handler", Level::Fault);
    }
    // 1.6 has none of its own: what is left is another scope, or another containerd.
    let mut etc = Etc::new("1.6", Scope::Default);
    etc.scope = Scope::RuntimeClass;
    etc.says(
        "runtime-handler",
        Level::Fault,
        "this snapshotter for all pods",
    );
    etc.scope = Scope::Default;
    etc.is_well();
}

#[test]
fn another_default_snapshotter_is_seen() {
    for version in VERSIONS {
        let etc = Etc::new(version, Scope::Default);
        let table = etc.text(MAIN);
        let (before, after) = table.split_once("[plugins.").unwrap();
        let after = after.replacen("snapshotter = \"accel\"", "snapshotter = \"overlayfs\"", 1);
        etc.write(MAIN, &format!("{before}[plugins.{after}"));
        etc.is_mended("default-snapshotter", Level::Fault);
    }
}

#[test]
fn discarded_layers_are_seen() {
    for (version, table) in [
        ("1.6", "[plugins.\"io.containerd.grpc.v1.cri\".containerd]"),
        ("1.7", "[plugins.\"io.containerd.grpc.v1.cri\".containerd]"),
        ("2.1", "[plugins.\"io.containerd.cri.v1.images\"]"),
    ] {
        let etc = Etc::new(version, Scope::Default);
        etc.replace(table, &format!("{table}\n  discard_unpacked_layers = true"));
        etc.is_mended("discard-unpacked-layers", Level::Fault);
    }
}

#[test]
fn a_drop_in_that_replaces_the_cri_is_seen() {
    let etc = Etc::new("1.7", Scope::Default);
    etc.write("conf.d/accel.toml", &etc.text(MAIN));
    let main = "version = 2\nimports = [\"conf.d/*.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause\"\n  [plugins.\"io.containerd.grpc.v1.cri\".cni]\n    bin_dir = \"/cni\"\n";
    etc.write(MAIN, main);
    etc.is_mended("drop-in", Level::Fault);
    let main = etc.text(MAIN);
    let all = ["pause", "/cni", "accel"];
    assert!(all.iter().all(|word| main.contains(word)), "{main}");
    assert!(!etc.text("conf.d/accel.toml").contains("grpc.v1.cri"));
    // 2.x merges.
    let etc = Etc::new("2.1", Scope::Default);
    etc.write("conf.d/accel.toml", &etc.text(MAIN));
    etc.write(MAIN, "version = 3\nimports = [\"conf.d/*.toml\"]\n[plugins.\"io.containerd.cri.v1.images\"]\n  stats_collect_period = 10\n");
    etc.is_well();
}

#[test]
fn somebody_elses_drop_in_is_seen() {
    let etc = Etc::new("1.6", Scope::Default);
    let imports = "imports = [\"conf.d/*.toml\"]\nversion = 2";
    etc.replace("version = 2", imports);
    etc.write(
        "conf.d/nvidia.toml",
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  default_runtime_name = \"nvidia\"\n",
    );
    etc.is_mended("drop-in", Level::Fault);
    assert!(etc.text(MAIN).contains("nvidia"));
    // In 2.x it may still say something else than we do.
    let etc = Etc::new("2.1", Scope::Default);
    etc.replace("version = 3", "imports = [\"conf.d/*.toml\"]\nversion = 3");
    etc.write(
        "conf.d/zz.toml",
        "version = 3\n[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"overlayfs\"\n",
    );
    etc.is_mended("default-snapshotter", Level::Fault);
}

#[test]
fn a_drop_in_that_nobody_imports_is_seen() {
    for version in VERSIONS {
        let etc = Etc::new(version, Scope::Default);
        etc.write("conf.d/accel.toml", &etc.text(MAIN));
        etc.write(MAIN, &format!("version = {}\n", etc.version.format()));
        etc.is_mended("imports", Level::Fault);
    }
}

#[test]
fn a_disabled_cri_is_seen() {
    for version in VERSIONS {
        let etc = Etc::new(version, Scope::Default);
        etc.replace(
            "version = ",
            "disabled_plugins = [\"cri\", \"other\"]\nversion = ",
        );
        etc.is_mended("cri-disabled", Level::Fault);
        assert!(etc.text(MAIN).contains("other"));
    }
}

#[test]
fn wrong_capabilities_are_seen() {
    let etc = Etc::new("2.1", Scope::Default);
    etc.replace("[\"remap-ids\"]", "[\"rebase\", \"remap-ids\"]");
    etc.is_mended("capabilities", Level::Fault);
    let etc = Etc::new("2.1", Scope::Default);
    etc.replace("capabilities = [\"remap-ids\"]", "");
    etc.is_mended("user-namespaces", Level::Warning);
    let mut etc = Etc::new("2.1", Scope::Default);
    etc.maps_ids = false;
    etc.is_mended("user-namespaces", Level::Fault);
    assert!(!etc.text(MAIN).contains("remap-ids"));
}

#[test]
fn a_transfer_service_that_does_not_know_us_is_seen() {
    for (version, level) in [("2.0", Level::Warning), ("2.1", Level::Fault)] {
        let etc = Etc::new(version, Scope::Default);
        etc.replace(
            "snapshotter = \"accel\"\n  differ",
            "snapshotter = \"native\"\n  differ",
        );
        etc.is_mended("transfer", level);
        assert!(etc.text(MAIN).contains("native"));
    }
}

#[test]
fn missing_disk_figures_are_seen() {
    let etc = Etc::new("1.7", Scope::Default);
    etc.replace("    root = ", "    other = ");
    etc.is_mended("disk-figures", Level::Warning);
    let mut etc = Etc::new("1.6", Scope::Default);
    etc.replace("version = 2", "root = \"/data/containerd\"\nversion = 2");
    let root = "/data/containerd/io.containerd.snapshotter.v1.accel";
    etc.says(
        "disk-figures",
        Level::Warning,
        &format!("start accel-snapshotter with --root {root}"),
    );
    etc.root = Path::new(root);
    etc.is_well();
}

#[test]
fn a_format_that_containerd_does_not_read_is_seen() {
    let etc = Etc::new("1.7", Scope::Default);
    etc.replace("version = 2", "version = 3");
    etc.is_mended("configuration-format", Level::Fault);
    // An old format: only 1.7 and later can write it anew.
    for (version, words) in [
        ("1.6", "write it anew with version = 2"),
        ("1.7", "`containerd config migrate`, or with version = 2"),
        ("2.1", "`containerd config migrate`, or with version = 3"),
    ] {
        let etc = Etc::new(version, Scope::Default);
        let wanted = format!("version = {}", etc.version.format());
        etc.replace(&wanted, "");
        etc.says("configuration-format", Level::Fault, words);
        etc.write(MAIN, &format!("{wanted}\n{}", etc.text(MAIN)));
        etc.is_well();
    }
}

#[test]
fn containerd_2_understands_the_old_format() {
    let etc = Etc::new("1.7", Scope::Default);
    let etc = Etc {
        version: Containerd::V2_0,
        maps_ids: false,
        ..etc
    };
    // Everything but what is new.
    let findings = etc.findings();
    let checks: Vec<_> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks, ["transfer", "annotations"], "{findings:#?}");
    etc.is_mended("annotations", Level::Fault);
}

#[test]
fn the_scope_follows_from_the_configuration() {
    for version in ["1.7", "2.1"] {
        for wanted in scopes(version) {
            let etc = Etc::new(version, wanted);
            assert_eq!(scope(&etc.read(), etc.version), wanted);
        }
    }
}

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
        nvidia: None,
    }
}

fn inject(change: impl FnOnce(&mut Node)) -> Vec<Finding> {
    let mut node = well();
    change(&mut node);
    let bad = node::examine(&node).into_iter();
    bad.filter(|finding| finding.level != Level::Ok).collect()
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
        _ if command.starts_with("echo ") || command.starts_with("systemctl enable ") => {}
        other => panic!("what does {other:?} do?"),
    }
}

#[test]
fn a_node_that_is_well_is_well() {
    assert_eq!(inject(|_| {}), []);
}

#[test]
fn faults_of_a_node_are_mended_by_the_commands() {
    type Change = fn(&mut Node);
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
        let mut node = well();
        change(&mut node);
        let bad: Vec<_> = node::examine(&node)
            .into_iter()
            .filter(|finding| finding.level != Level::Ok)
            .collect();
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert_eq!((bad[0].check, bad[0].level), (check, level), "{bad:#?}");
        for step in &bad[0].mend {
            if let Step::Run(command) = step {
                perform(&mut node, command);
            }
        }
        let left = node::examine(&node);
        let well = left.iter().all(|finding| finding.level == Level::Ok);
        assert!(well, "{check}: {left:#?}");
    }
}

/// What is done by hand: the words that say so, and what it does to a node.
struct ByHand {
    check: &'static str,
    level: Level,
    inject: fn(&mut Node),
    words: &'static str,
    mend: fn(&mut Node),
}

fn by_hand(
    check: &'static str,
    level: Level,
    inject: fn(&mut Node),
    words: &'static str,
    mend: fn(&mut Node),
) -> ByHand {
    ByHand {
        check,
        level,
        inject,
        words,
        mend,
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
    let boot: fn(&mut Node) = |node| {
        node.release = "6.12.1".to_owned();
        node.erofs = Support::Present;
        node.overlay = Support::Present;
        node.ublk = Support::Present;
    };
    let injected = [
        by_hand(
            "kernel",
            Level::Fault,
            |node| node.erofs = Support::Absent,
            "boot a kernel that has it",
            boot,
        ),
        by_hand(
            "kernel",
            Level::Fault,
            |node| node.overlay = Support::Absent,
            "boot a kernel that has it",
            boot,
        ),
        by_hand(
            "ublk",
            Level::Warning,
            |node| node.ublk = Support::Absent,
            "boot Linux 6.5 or later with CONFIG_BLK_DEV_UBLK",
            boot,
        ),
        by_hand(
            "ublk",
            Level::Fault,
            |node| {
                node.ublk = Support::Absent;
                node.fuse = Support::Absent;
            },
            "boot a kernel with ublk",
            boot,
        ),
        by_hand(
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
        by_hand(
            "ublk-server",
            Level::Fault,
            |node| server_status(node).verifies = false,
            "install a release build",
            |node| node.server.answer = Ok(server()),
        ),
        by_hand(
            "ublk-server",
            Level::Warning,
            |node| server_status(node).version = "0.9".to_owned(),
            "install the same version of both",
            |node| node.server.answer = Ok(server()),
        ),
        by_hand(
            "ufs",
            Level::Fault,
            |node| {
                server_status(node).sources[0].in_use = false;
                server_status(node).sources[0].state = "does not answer".to_owned();
            },
            "see that it is mounted and answers: findmnt --target /mnt/ufs; ls /mnt/ufs/layers",
            |node| server_status(node).sources[0].in_use = true,
        ),
        by_hand(
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
        by_hand(
            "snapshotter",
            Level::Fault,
            |node| status(node).server = "/other".into(),
            "start it with --server /run/ublk.sock",
            |node| status(node).server = "/run/ublk.sock".into(),
        ),
        by_hand(
            "snapshotter",
            Level::Fault,
            |node| status(node).ufs = Some("/mnt/other".into()),
            "give both the same --ufs",
            |node| status(node).ufs = Some("/mnt/ufs".into()),
        ),
        by_hand(
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
        by_hand(
            "fallbacks",
            Level::Warning,
            |node| status(node).fallbacks = 3,
            "`accel-snapshotter status` says which and why",
            // They are counted since the start.
            |node| node.snapshotter.answer = Ok(snapshotter()),
        ),
        by_hand(
            "runtime-handler",
            Level::Fault,
            |node| node.nvidia = Some(false),
            "install NVIDIA's container toolkit",
            |node| node.nvidia = Some(true),
        ),
    ];
    for ByHand {
        check,
        level,
        inject: change,
        words,
        mend,
    } in injected
    {
        let bad = inject(change);
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert_eq!((bad[0].check, bad[0].level), (check, level), "{bad:#?}");
        let says = |step: &Step| matches!(step, Step::Do(what) if what.contains(words));
        assert!(bad[0].mend.iter().any(says), "{words:?}: {:#?}", bad[0]);
        let left = inject(|node| {
            change(node);
            mend(node);
        });
        assert_eq!(left, [], "{check}, after {words:?}");
    }
}
