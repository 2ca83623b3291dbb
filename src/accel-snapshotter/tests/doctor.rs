//! The doctor of containerd's configuration: every fault is injected into one that is well,
//! is found, and is gone when what the doctor says has been done to the files.

use accel_snapshotter::config::{self, Containerd, Scope, Wanted};
use accel_snapshotter::doctor::containerd::{Configuration, File, examine, scope};
use accel_snapshotter::doctor::{Finding, Level, Step};
use accel_snapshotter::edit;
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
        assert!(tells(finding, words), "{words:?}: {finding:#?}");
    }

    fn is_well(&self) {
        let findings = self.findings();
        let well = findings.iter().all(|finding| finding.level == Level::Ok);
        assert!(well, "{findings:#?}\n{}", self.text(MAIN));
    }
}

/// Whether a person is told to do this.
fn tells(finding: &Finding, words: &str) -> bool {
    let tells = |step: &Step| matches!(step, Step::Do(what) if what.contains(words));
    finding.mend.iter().any(tells)
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
