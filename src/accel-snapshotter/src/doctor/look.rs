//! Collects what there is to know of a node. Changes nothing.

use super::containerd::{self, Configuration, DROP_INS, File};
use super::node::{self, Asked, Node, Running, Support};
use super::{Finding, Report, Step};
use crate::config::{Containerd, NAME, NVIDIA, Scope, Wanted};
use crate::service::wire::introspection::PluginsRequest;
use crate::service::wire::introspection::introspection_client::IntrospectionClient;
use crate::service::wire::version::version_client::VersionClient;
use crate::{idmap, service};
use accel_client::paths::Paths;
use accel_client::protocol::Command;
use accel_client::wire;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::{Table, Value};

/// How long anybody may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where to look, and what is expected.
#[derive(Debug)]
pub struct Options {
    /// The snapshotter's socket.
    pub socket: PathBuf,
    /// Its root directory, if it does not answer.
    pub root: PathBuf,
    /// `ublk-server`'s socket and run directory.
    pub server: Paths,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// Its main configuration file.
    pub configuration: PathBuf,
    /// Its version, if it does not answer.
    pub version: Option<Containerd>,
    /// For which pods; otherwise what the configuration looks like.
    pub scope: Option<Scope>,
}

/// Looks at everything.
pub async fn look(options: &Options) -> Report {
    let release = idmap::release();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| filesystems.split_whitespace().any(|word| word == name);
    let support = |module: &str, present: bool| match present {
        true => Support::Present,
        false if loadable(&release, module) => Support::Loadable,
        false => Support::Absent,
    };
    let running = Asked {
        socket: options.containerd.clone(),
        answer: ask_containerd(&options.containerd).await,
    };
    let version = options.version.or_else(|| {
        let running = running.answer.as_ref().ok()?;
        let number = running.version.trim_start_matches('v');
        let number: String = number.split(['~', '+', '-']).next()?.to_owned();
        number.parse().ok()
    });
    let snapshotter = service::ask_status(options.socket.clone(), service::PATIENCE).await;
    let root = snapshotter.as_ref().ok().map(|status| status.root.clone());
    let access = fs::metadata(&options.socket).ok();
    let server = wire::ask_within(&options.server.socket, &Command::Status, PATIENCE);

    let mut findings = Vec::new();
    let mut scope = options.scope.unwrap_or(Scope::Default);
    let configuration = match version {
        Some(version) => match read(&options.configuration) {
            Ok(configuration) => {
                if options.scope.is_none() {
                    scope = containerd::scope(&configuration, version);
                }
                containerd::examine(
                    &configuration,
                    &Wanted {
                        version,
                        scope,
                        socket: &options.socket,
                        root: &root.unwrap_or_else(|| options.root.clone()),
                        local_pull: false,
                        maps_ids: idmap::supported(&release),
                    },
                )
            }
            Err(finding) => vec![finding],
        },
        None => vec![Finding::warning(
            "containerd-configuration",
            "not looked at: containerd does not say which version it is",
            vec![Step::Do("name it with --containerd".to_owned())],
        )],
    };
    findings.extend(node::examine(&Node {
        erofs: support("erofs", has("erofs")),
        overlay: support("overlay", has("overlay")),
        fuse: support("fuse", has("fuse")),
        ublk: support("ublk_drv", Path::new("/dev/ublk-control").exists()),
        loops: support("loop", Path::new("/dev/loop-control").exists()),
        release,
        version: env!("CARGO_PKG_VERSION"),
        server: Asked {
            socket: options.server.socket.clone(),
            answer: server.map_err(|error| format!("{error:#}")),
        },
        snapshotter: Asked {
            socket: options.socket.clone(),
            answer: snapshotter.map_err(|error| format!("{error:#}")),
        },
        access: access.map(|metadata| (metadata.uid(), metadata.mode() & 0o777)),
        containerd: running,
        udev: Path::new("/run/udev/control").exists().then(has_udev_rules),
        nvidia: (scope == Scope::Nvidia).then(|| Path::new(NVIDIA).exists()),
    }));
    findings.extend(configuration);
    Report { findings }
}

/// Whether udev finds our rules, in any of its directories.
fn has_udev_rules() -> bool {
    let places = ["/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"].map(Path::new);
    let rules = Path::new("udev/rules.d").join(node::UDEV_RULES);
    places.iter().any(|place| place.join(&rules).exists())
}

/// Whether the kernel has a module, or has it built in.
fn loadable(release: &str, module: &str) -> bool {
    let name = format!("/{module}.ko");
    ["modules.builtin", "modules.dep"].iter().any(|list| {
        let list = Path::new("/lib/modules").join(release).join(list);
        let list = fs::read_to_string(list).unwrap_or_default();
        list.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            path.contains(&name)
        })
    })
}

async fn ask_containerd(socket: &Path) -> Result<Running, String> {
    let channel = service::connect(socket.to_owned(), PATIENCE)
        .await
        .map_err(|error| format!("{error:#}"))?;
    let version = VersionClient::new(channel.clone()).version(()).await;
    let version = version.map_err(|status| status.message().to_owned())?;
    let request = PluginsRequest {
        filters: vec![format!("type==io.containerd.snapshotter.v1,id=={NAME}")],
    };
    let plugins = IntrospectionClient::new(channel).plugins(request).await;
    let plugins = plugins.map_err(|status| status.message().to_owned())?;
    Ok(Running {
        version: version.into_inner().version,
        knows_us: !plugins.into_inner().plugins.is_empty(),
    })
}

/// Reads the configuration with everything that it imports.
pub fn read(main: &Path) -> Result<Configuration, Finding> {
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![main.to_owned()];
    while !waiting.is_empty() {
        let path = waiting.remove(0);
        if !seen.insert(path.clone()) {
            continue;
        }
        let file = read_file(&path)?;
        let mut imports = Vec::new();
        if let Some(Value::Array(patterns)) = file.table.get("imports") {
            for pattern in patterns.iter().filter_map(Value::as_str) {
                imports.extend(matching(&path.with_file_name(pattern)));
            }
        }
        files.push(file);
        waiting.splice(0..0, imports);
    }
    let beside = matching(&main.with_file_name(DROP_INS)).into_iter();
    let stray = beside.filter(|path| !seen.contains(path));
    let stray = stray.filter_map(|path| read_file(&path).ok()).collect();
    Ok(Configuration { files, stray })
}

fn read_file(path: &Path) -> Result<File, Finding> {
    let fail = |what: String| {
        let mend =
            Step::Do("correct it; `containerd config dump` says whether it can be read".to_owned());
        Finding::fault("containerd-configuration", what, vec![mend])
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        // containerd then takes its defaults.
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(fail(format!("cannot read {}: {error}", path.display()))),
    };
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let why = error.message().to_owned();
        fail(format!("{} is no TOML: {why}", path.display()))
    })?;
    Ok(File {
        path: path.to_owned(),
        table,
    })
}

/// The files that a pattern names: `*` and `?` in the last part only, sorted.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy();
    if !name.contains(['*', '?']) {
        return vec![pattern.to_owned()];
    }
    let directory = pattern.parent().unwrap_or(Path::new("/"));
    let mut found: Vec<_> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|file| matches(&name, file))
        .map(|file| directory.join(file))
        .collect();
    found.sort();
    found
}

fn matches(pattern: &str, name: &str) -> bool {
    let mut characters = pattern.chars();
    match characters.next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = characters.as_str();
            (0..=name.len()).any(|at| name.is_char_boundary(at) && matches(rest, &name[at..]))
        }
        Some(wanted) => {
            let mut name = name.chars();
            let found = name.next();
            found.is_some_and(|found| wanted == '?' || wanted == found)
                && matches(characters.as_str(), name.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_read_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("conf.d")).unwrap();
        fs::create_dir(path("more")).unwrap();
        for (name, text) in [
            (
                "config.toml",
                "imports = [\"more/?.toml\", \"more/x.toml\"]\n",
            ),
            ("more/b.toml", "b = 1\n"),
            ("more/a.toml", "a = 1\n"),
            ("more/long.toml", "l = 1\n"),
            ("more/x.toml", "x = 1\n"),
            ("conf.d/accel.toml", "y = 1\n"),
        ] {
            fs::write(path(name), text).unwrap();
        }
        let found = read(&path("config.toml")).unwrap();
        let names = |files: &[File]| -> Vec<_> {
            let files = files.iter();
            files.map(|file| file.path.clone()).collect()
        };
        let expected = ["config.toml", "more/a.toml", "more/b.toml", "more/x.toml"];
        assert_eq!(names(&found.files), expected.map(path));
        assert_eq!(names(&found.stray), [path("conf.d/accel.toml")]);
        fs::write(path("more/a.toml"), "a = \n").unwrap();
        let finding = read(&path("config.toml")).unwrap_err();
        assert!(finding.what.contains("more/a.toml"), "{finding:?}");
    }
}
