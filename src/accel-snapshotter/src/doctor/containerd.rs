//! containerd's configuration: what it comes to, and whether it lets this snapshotter
//! do its work. Values in, findings out.
//!
//! containerd reads its main file and then what that imports. A later file counts more;
//! of a plugin or proxy plugin that it names, everything in the files before is gone
//! (plugins: up to 1.7).

use super::{Finding, Step};
use crate::config::{self, CRI_1, Containerd, NAME, Scope, TRANSFER, Wanted};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// One file.
#[derive(Debug, Clone, PartialEq)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// What it has.
    pub table: Table,
}

/// All that containerd reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// The main file, then what is imported, in the order in which it is read.
    pub files: Vec<File>,
    /// Files beside it, in `conf.d`, that are not imported.
    pub stray: Vec<File>,
}

/// What is imported if the main file says so.
pub const DROP_INS: &str = "conf.d/*.toml";

type At<'a> = &'a [&'a str];

impl Configuration {
    fn main(&self) -> &Path {
        self.files.first().map_or(Path::new(""), |file| &file.path)
    }

    /// The value that counts, and the file that it is from.
    fn find(&self, version: Containerd, at: At<'_>) -> Option<(&File, &Value)> {
        let whole = match at {
            ["plugins", _, ..] => version <= Containerd::V1_7,
            ["proxy_plugins", _, ..] => true,
            _ => false,
        };
        for file in self.files.iter().rev() {
            let found = file.get(version, at);
            if found.is_some() || (whole && file.get(version, &at[..2]).is_some()) {
                return found.map(|value| (file, value));
            }
        }
        None
    }

    fn is(&self, version: Containerd, at: At<'_>, wanted: &Value) -> bool {
        let found = self.find(version, at);
        found.is_some_and(|(_, value)| value == wanted)
    }

    /// Where a value goes: to where there is one, else beside its neighbours, else to
    /// where this version wants new ones.
    fn step(&self, version: Containerd, at: At<'_>, value: Value) -> Vec<Step> {
        let old = version <= Containerd::V1_7;
        let neighbour = match at {
            ["plugins" | "proxy_plugins", _, ..] if old || at[0] == "proxy_plugins" => {
                self.find(version, &at[..2])
            }
            _ => None,
        };
        let file = self.find(version, at).or(neighbour).map(|(file, _)| file);
        if let Some(file) = file {
            return vec![file.set(version, at, value)];
        }
        match self.files.first() {
            Some(main) if !old && main.format() < 3 => {
                // A file of the old format has other names for the same.
                let path = main.path.with_file_name("conf.d/accel.toml");
                let new = File {
                    table: [("version".to_owned(), Value::from(3))]
                        .into_iter()
                        .collect(),
                    path,
                };
                let mut steps = self.import();
                steps.push(new.set(version, &["version"], Value::from(3)));
                steps.push(new.set(version, at, value));
                steps
            }
            Some(main) => vec![main.set(version, at, value)],
            None => Vec::new(),
        }
    }

    /// Has the main file import the others.
    fn import(&self) -> Vec<Step> {
        let Some(main) = self.files.first() else {
            return Vec::new();
        };
        let mut imports = match main.table.get("imports") {
            Some(Value::Array(imports)) => imports.clone(),
            _ => Vec::new(),
        };
        let pattern = main.path.with_file_name(DROP_INS);
        let pattern = Value::from(pattern.to_string_lossy().into_owned());
        if imports.contains(&pattern) {
            return Vec::new();
        }
        imports.push(pattern);
        vec![Step::Set {
            file: main.path.clone(),
            table: Vec::new(),
            key: "imports".to_owned(),
            value: Value::Array(imports),
        }]
    }
}

impl File {
    fn format(&self) -> i64 {
        let format = self.table.get("version").and_then(Value::as_integer);
        format.unwrap_or(1)
    }

    fn get(&self, version: Containerd, at: At<'_>) -> Option<&Value> {
        let there = named(at, version, self.format());
        let mut names = there.iter();
        let mut value = self.table.get(*names.next()?)?;
        for name in names {
            value = value.as_table()?.get(*name)?;
        }
        Some(value)
    }

    fn set(&self, version: Containerd, at: At<'_>, value: Value) -> Step {
        let mut table: Vec<_> = named(at, version, self.format())
            .into_iter()
            .map(str::to_owned)
            .collect();
        let key = table.pop().unwrap_or_default();
        Step::Set {
            file: self.path.clone(),
            table,
            key,
            value,
        }
    }
}

/// The names that a file of this format has for it: containerd 2 understands the
/// format of 1.x, where one plugin has all of the CRI.
fn named<'a>(at: At<'a>, version: Containerd, format: i64) -> Vec<&'a str> {
    if format < 3 && version > Containerd::V1_7 {
        match *at {
            ["plugins", "io.containerd.cri.v1.images", ref rest @ ..] => {
                return [&["plugins", CRI_1, "containerd"][..], rest].concat();
            }
            ["plugins", "io.containerd.cri.v1.runtime", ref rest @ ..] => {
                return [&["plugins", CRI_1][..], rest].concat();
            }
            _ => {}
        }
    }
    at.to_vec()
}

/// Does what the steps say to the files that are known; what they make becomes the
/// last one that is read.
pub fn apply(config: &mut Configuration, steps: &[Step]) {
    let pattern_added = |value: &Value| matches!(value, Value::Array(_));
    for edit in steps.iter().filter_map(Step::edit) {
        let (path, names, key, value) = (edit.file, edit.table, edit.key, edit.value);
        if !config.files.iter().any(|file| file.path == path) {
            config.files.push(File {
                path: path.to_owned(),
                table: Table::new(),
            });
        }
        for file in config.files.iter_mut().filter(|file| file.path == path) {
            let table = descend(&mut file.table, names);
            match value {
                Some(value) => drop(table.insert(key.to_owned(), value.clone())),
                None => drop(table.remove(key)),
            }
        }
        if names.is_empty() && key == "imports" && value.is_some_and(pattern_added) {
            config.files.append(&mut config.stray);
        }
    }
}

/// The table of this name, made if need be.
fn descend<'a>(table: &'a mut Table, names: &[String]) -> &'a mut Table {
    let Some((name, rest)) = names.split_first() else {
        return table;
    };
    let entry = table.entry(name.clone());
    let value = entry.or_insert_with(|| Value::Table(Table::new()));
    if !value.is_table() {
        *value = Value::Table(Table::new());
    }
    match value {
        Value::Table(inner) => descend(inner, rest),
        _ => unreachable!("it has just been made one"),
    }
}

/// Leaves of a table with their names; arrays are leaves.
fn leaves(table: &Table) -> Vec<(Vec<String>, Value)> {
    let mut all = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) => {
                for (mut at, value) in leaves(inner) {
                    at.insert(0, name.clone());
                    all.push((at, value));
                }
            }
            value => all.push((vec![name.clone()], value.clone())),
        }
    }
    all
}

/// Judges a configuration: `wanted` is how the snapshotter runs and what for.
pub fn examine(config: &Configuration, wanted: &Wanted<'_>) -> Vec<Finding> {
    let version = wanted.version;
    let mut config = config.clone();
    let mut findings = Vec::new();
    // What follows is judged as it will be when these are mended.
    for judge in [format, imports, drop_ins] {
        let found = judge(&config, version);
        for finding in &found {
            apply(&mut config, &finding.mend);
        }
        findings.extend(found);
    }
    let mut wanted = *wanted;
    wanted.local_pull = pulls_locally(&config, version);
    let judged = [
        disabled(&config, version),
        stanza(&config, &wanted),
        capabilities(&config, &wanted),
        discarded_layers(&config, version),
        disk_figures(&config, &wanted),
    ];
    findings.extend(judged.into_iter().flatten());
    if findings.is_empty() {
        let files: Vec<_> = config
            .files
            .iter()
            .map(|file| file.path.display())
            .collect();
        let text = files.iter().map(ToString::to_string).collect::<Vec<_>>();
        findings.push(Finding::ok("containerd-configuration", text.join(", ")));
    }
    findings
}

fn format(config: &Configuration, version: Containerd) -> Vec<Finding> {
    let Some(main) = config.files.first() else {
        return Vec::new();
    };
    let (has, wants) = (main.format(), version.format());
    let what = format!("{} has version {has}", main.path.display());
    match has {
        1 if main.table.is_empty() => vec![Finding::warning(
            "configuration-format",
            format!("{} is empty or missing", main.path.display()),
            vec![main.set(version, &["version"], Value::from(wants))],
        )],
        1 => {
            let how = match version {
                Containerd::V1_6 => "",
                _ => "`containerd config migrate`, or with ",
            };
            vec![Finding::fault(
                "configuration-format",
                format!("{what}, an old format"),
                vec![Step::Do(format!(
                    "write it anew with {how}version = {wants}"
                ))],
            )]
        }
        has if has > wants => vec![Finding::fault(
            "configuration-format",
            format!("{what}; containerd 1.x reads 2 and ends"),
            vec![main.set(version, &["version"], Value::from(wants))],
        )],
        _ => Vec::new(),
    }
}

fn imports(config: &Configuration, _: Containerd) -> Vec<Finding> {
    let ours = |file: &&File| {
        let proxies = file.table.get("proxy_plugins").and_then(Value::as_table);
        proxies.is_some_and(|proxies| proxies.contains_key(NAME))
    };
    let Some(file) = config.stray.iter().find(ours) else {
        return Vec::new();
    };
    let what = format!(
        "{} is not read: {} does not import it",
        file.path.display(),
        config.main().display()
    );
    vec![Finding::fault("imports", what, config.import())]
}

fn drop_ins(config: &Configuration, version: Containerd) -> Vec<Finding> {
    let mut findings = Vec::new();
    let cri = ["plugins", CRI_1];
    let Some((main, others)) = config.files.split_first() else {
        return findings;
    };
    if version > Containerd::V1_7 || main.get(version, &cri).is_none() {
        return findings;
    }
    for file in others {
        let Some(Value::Table(table)) = file.get(version, &cri) else {
            continue;
        };
        let mut mend = Vec::new();
        for (at, value) in leaves(table) {
            let names = at.iter().map(String::as_str);
            let at: Vec<_> = cri.into_iter().chain(names).collect();
            mend.push(main.set(version, &at, value));
        }
        mend.push(Step::Remove {
            file: file.path.clone(),
            table: vec!["plugins".to_owned()],
            key: CRI_1.to_owned(),
        });
        let what = format!(
            "{} replaces everything that {} says of the CRI (networks, sandbox image, other runtimes): containerd 1.x does not merge",
            file.path.display(),
            main.path.display()
        );
        findings.push(Finding::fault("drop-in", what, mend));
    }
    findings
}

/// Whether the CRI of 2.1 and later has been told not to use the transfer service.
fn pulls_locally(config: &Configuration, version: Containerd) -> bool {
    let (plugin, _) = version.image_table();
    let is = |key, value: bool| config.is(version, &["plugins", plugin, key], &value.into());
    is("use_local_image_pull", true) || is("disable_snapshot_annotations", false)
}

fn disabled(config: &Configuration, version: Containerd) -> Vec<Finding> {
    let at = ["disabled_plugins"];
    let Some((file, Value::Array(all))) = config.find(version, &at) else {
        return Vec::new();
    };
    let (images, _) = version.image_table();
    let cri = ["cri", CRI_1, images, version.runtime_plugin()];
    let others: Vec<_> = all
        .iter()
        .filter(|plugin| !plugin.as_str().is_some_and(|plugin| cri.contains(&plugin)))
        .cloned()
        .collect();
    if others.len() == all.len() {
        return Vec::new();
    }
    let what = format!(
        "{} disables the CRI: a kubelet cannot use this containerd",
        file.path.display()
    );
    let mend = vec![file.set(version, &at, Value::Array(others))];
    vec![Finding::fault("cri-disabled", what, mend)]
}

/// Everything that [`config::stanza`] has must be there.
fn stanza(config: &Configuration, wanted: &Wanted<'_>) -> Vec<Finding> {
    let version = wanted.version;
    let stanza = match config::stanza(wanted) {
        Ok(text) => text.parse::<Table>().unwrap_or_default(),
        Err(why) => {
            let mend = vec![Step::Do(
                "use containerd 1.7 or later, or this snapshotter for all pods".to_owned(),
            )];
            return vec![Finding::fault("runtime-handler", why, mend)];
        }
    };
    let mut findings: Vec<Finding> = Vec::new();
    for (at, value) in leaves(&stanza) {
        let at: Vec<_> = at.iter().map(String::as_str).collect();
        let finding = match at.as_slice() {
            // Judged by `format` and `capabilities`.
            ["version"] => continue,
            ["proxy_plugins", _, "capabilities"] if config.find(version, &at[..2]).is_some() => {
                continue;
            }
            ["plugins", CRI_1, "containerd", "runtimes", "runc", _]
                if has_another_runtime(config, wanted) =>
            {
                continue;
            }
            ["plugins", TRANSFER, "unpack_config"] => unpacking(config, wanted, &at, &value),
            _ if config.is(version, &at, &value) => continue,
            _ => Some(missing(config, wanted, &at, value)),
        };
        let Some(finding) = finding else { continue };
        match findings
            .iter_mut()
            .find(|other| other.check == finding.check)
        {
            Some(other) => {
                other.what = format!("{}; {}", other.what, finding.what);
                other.level = other.level.max(finding.level);
                for step in finding.mend {
                    if !other.mend.contains(&step) {
                        other.mend.push(step);
                    }
                }
            }
            None => findings.push(finding),
        }
    }
    findings
}

/// Whether there is a runtime beside the one of our class.
fn has_another_runtime(config: &Configuration, wanted: &Wanted<'_>) -> bool {
    let at = ["plugins", CRI_1, "containerd", "runtimes"];
    let found = config.find(wanted.version, &at);
    let runtimes = found.and_then(|(_, value)| value.as_table());
    runtimes.is_some_and(|runtimes| {
        let mut names = runtimes.keys();
        names.any(|name| Some(name.as_str()) != wanted.scope.runtime())
    })
}

/// A value of ours that is not there, or another.
fn missing(config: &Configuration, wanted: &Wanted<'_>, at: At<'_>, value: Value) -> Finding {
    let version = wanted.version;
    let key = at.last().copied().unwrap_or_default();
    let found = match config.find(version, at) {
        Some((file, other)) => format!("{key} is {other} in {}", file.path.display()),
        None => format!("{key} = {value} is missing"),
    };
    let mend = config.step(version, at, value);
    match at {
        ["proxy_plugins", _, "exports", "root"] => Finding::warning(
            "disk-figures",
            format!("{found}: the kubelet has no disk figures of this snapshotter"),
            mend,
        ),
        ["proxy_plugins", _, "exports", _] | [.., "disable_snapshot_annotations"] => {
            Finding::fault(
                "annotations",
                format!("{found}: containerd does not say what it pulls"),
                mend,
            )
        }
        ["proxy_plugins", ..] => Finding::fault(
            "proxy-plugin",
            format!("{found}: containerd does not know this snapshotter"),
            mend,
        ),
        ["plugins", _, .., "runtimes" | "runtime_platforms", class, _]
        | ["plugins", _, .., "runtimes", class, _, _] => Finding::fault(
            "runtime-handler",
            format!("the runtime {class}: {found}"),
            mend,
        ),
        [.., "snapshotter"] => Finding::fault(
            "default-snapshotter",
            format!("{found}: images are unpacked by another snapshotter"),
            mend,
        ),
        _ => Finding::fault("containerd-configuration", found, mend),
    }
}

/// The transfer service must know this snapshotter, and go on to know overlayfs.
fn unpacking(
    config: &Configuration,
    wanted: &Wanted<'_>,
    at: At<'_>,
    value: &Value,
) -> Option<Finding> {
    let found = config.find(wanted.version, at);
    let mut all = found.map_or(Vec::new(), |(_, value)| {
        value.as_array().cloned().unwrap_or_default()
    });
    let snapshotter = |entry: &Value| {
        let name = entry.get("snapshotter").and_then(Value::as_str);
        name.map(str::to_owned)
    };
    let mut missing = Vec::new();
    for entry in value.as_array().into_iter().flatten() {
        if !all
            .iter()
            .any(|other| snapshotter(other) == snapshotter(entry))
        {
            missing.extend(snapshotter(entry));
            all.push(entry.clone());
        }
    }
    if missing.is_empty() {
        return None;
    }
    let for_whom = match wanted.version == Containerd::V2_1 && !wanted.local_pull {
        true => "images cannot be pulled",
        false => "`ctr images pull` fails",
    };
    let what = format!(
        "the transfer service cannot unpack for {}: {for_whom} with it",
        missing.join(" and ")
    );
    let mend = config.step(wanted.version, at, Value::Array(all));
    Some(match wanted.version == Containerd::V2_1 {
        true => Finding::fault("transfer", what, mend),
        false => Finding::warning("transfer", what, mend),
    })
}

fn without<'a>(all: &[&'a str], name: &str) -> Vec<&'a str> {
    let others = all.iter().copied();
    others.filter(|other| *other != name).collect()
}

fn capabilities(config: &Configuration, wanted: &Wanted<'_>) -> Vec<Finding> {
    let version = wanted.version;
    let at = ["proxy_plugins", NAME, "capabilities"];
    let has: Vec<_> = match config.find(version, &at) {
        Some((_, Value::Array(all))) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let set = |names: &[&str]| {
        let names = names.iter().map(|name| Value::from(*name)).collect();
        config.step(version, &at, Value::Array(names))
    };
    let mut findings = Vec::new();
    if has.contains(&"rebase") {
        findings.push(Finding::fault(
            "capabilities",
            "\"rebase\" lets containerd make layers without their parents, on which lazy layers depend",
            set(&without(&has, "rebase")),
        ));
    }
    let maps = has.contains(&"remap-ids");
    let can = wanted.maps_ids && version > Containerd::V1_7;
    if maps && !can {
        findings.push(Finding::fault(
            "user-namespaces",
            "\"remap-ids\" is among the capabilities, but needs containerd 2.0 and Linux 5.19: pods with hostUsers: false do not start",
            set(&without(&has, "remap-ids")),
        ));
    }
    if can && !maps && config.find(version, &at[..2]).is_some() {
        let names: Vec<_> = has.iter().copied().chain(["remap-ids"]).collect();
        findings.push(Finding::warning(
            "user-namespaces",
            "\"remap-ids\" is not among the capabilities: for pods with hostUsers: false containerd copies and changes every file of the image",
            set(&names),
        ));
    }
    findings
}

fn discarded_layers(config: &Configuration, version: Containerd) -> Vec<Finding> {
    let (plugin, table) = version.image_table();
    let at: Vec<_> = ["plugins", plugin]
        .into_iter()
        .chain(table)
        .chain(["discard_unpacked_layers"])
        .collect();
    if !config.is(version, &at, &Value::from(true)) {
        return Vec::new();
    }
    let what = "discard_unpacked_layers is true: images that are on the node already, unpacked by another snapshotter, cannot be unpacked by this one, and their pods do not start";
    let mut mend = config.step(version, &at, Value::from(false));
    mend.push(Step::Do(
        "restart containerd, and pull once more what was pulled before".to_owned(),
    ));
    vec![Finding::fault("discard-unpacked-layers", what, mend)]
}

/// 1.6 is not told where our root directory is.
fn disk_figures(config: &Configuration, wanted: &Wanted<'_>) -> Vec<Finding> {
    let version = wanted.version;
    if version != Containerd::V1_6 {
        return Vec::new();
    }
    let root = config.find(version, &["root"]);
    let root = root.and_then(|(_, value)| value.as_str());
    let expected = Path::new(root.unwrap_or("/var/lib/containerd"))
        .join(format!("io.containerd.snapshotter.v1.{NAME}"));
    if expected == wanted.root {
        return Vec::new();
    }
    let what = format!(
        "the snapshotter's root is {}, but containerd 1.6 looks for disk figures in {}",
        wanted.root.display(),
        expected.display()
    );
    let mend = vec![Step::Do(format!(
        "start accel-snapshotter with --root {}",
        expected.display()
    ))];
    vec![Finding::warning("disk-figures", what, mend)]
}

/// What a doctor looks for when nobody says: one runtime class or all pods.
pub fn scope(config: &Configuration, version: Containerd) -> Scope {
    let (plugin, table) = version.image_table();
    let default: Vec<_> = ["plugins", plugin]
        .into_iter()
        .chain(table)
        .chain(["snapshotter"])
        .collect();
    if config.is(version, &default, &Value::from(NAME)) {
        return Scope::Default;
    }
    let class = |scope: &Scope| {
        let runtime = scope.runtime().unwrap_or_default();
        let plugin = version.runtime_plugin();
        let at = ["plugins", plugin, "containerd", "runtimes", runtime];
        config.find(version, &at).is_some()
    };
    let classes = [Scope::RuntimeClass, Scope::Nvidia];
    classes.into_iter().find(class).unwrap_or(Scope::Default)
}
