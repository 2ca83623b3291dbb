//! What containerd's configuration needs, by version.
//!
//! containerd 1.x drop-ins *replace* the whole table of the CRI plugin, so there the
//! text belongs into the main file; 2.x merges.

use std::fmt::Write as _;
use std::path::Path;
use std::str::FromStr;

/// A line of containerd versions that are configured in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Containerd {
    /// 1.6
    V1_6,
    /// 1.7
    V1_7,
    /// 2.0 and later
    V2,
}

impl FromStr for Containerd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split('.').collect::<Vec<_>>().as_slice() {
            ["1", "6", ..] => Ok(Self::V1_6),
            ["1", "7", ..] => Ok(Self::V1_7),
            ["2", ..] => Ok(Self::V2),
            _ => Err("containerd 1.6, 1.7 and 2.x are known".to_owned()),
        }
    }
}

/// For which pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scope {
    /// All of them
    Default,
    /// Those of a runtime class of its own, `runc-accel`
    RuntimeClass,
    /// The same with NVIDIA's runtime, `nvidia-accel`
    Nvidia,
}

/// The text, or why there is none.
pub fn stanza(
    version: Containerd,
    scope: Scope,
    socket: &Path,
    root: &Path,
) -> Result<String, String> {
    if version == Containerd::V1_6 && scope != Scope::Default {
        return Err(
            "containerd 1.6 has one snapshotter for all pods; runtime classes with their own need 1.7"
                .to_owned(),
        );
    }
    let (cri, images) = match version {
        Containerd::V1_6 | Containerd::V1_7 => {
            let cri = "io.containerd.grpc.v1.cri";
            (cri, format!("[plugins.\"{cri}\".containerd]"))
        }
        Containerd::V2 => (
            "io.containerd.cri.v1.runtime",
            "[plugins.\"io.containerd.cri.v1.images\"]".to_owned(),
        ),
    };
    let mut text = String::new();
    let mut line = |line: &str| {
        // Into a String: cannot fail.
        let _ = writeln!(text, "{line}");
    };
    match version {
        Containerd::V1_6 | Containerd::V1_7 => {
            line(
                "# Into /etc/containerd/config.toml itself, each line into the table of that name",
            );
            line("# if there is one: a drop-in would replace everything else of the CRI plugin.");
            line("version = 2");
        }
        Containerd::V2 => {
            line("# Into /etc/containerd/conf.d/accel.toml, if the main file has");
            line("# imports = [\"/etc/containerd/conf.d/*.toml\"], or into the main file itself.");
            line("version = 3");
        }
    }
    line("");
    line("[proxy_plugins.accel]");
    line("  type = \"snapshot\"");
    line(&format!("  address = {:?}", socket.to_string_lossy()));
    if version != Containerd::V1_6 {
        // 1.6 looks in its own root directory, where ours is by default.
        line("  [proxy_plugins.accel.exports]");
        line(&format!("    root = {:?}", root.to_string_lossy()));
    }
    line("");
    line(&images);
    if scope == Scope::Default {
        line("  snapshotter = \"accel\"");
    }
    line("  disable_snapshot_annotations = false");
    let class = match scope {
        Scope::Default => return Ok(text),
        Scope::RuntimeClass => "runc-accel",
        Scope::Nvidia => "nvidia-accel",
    };
    line("");
    line(&format!("[plugins.\"{cri}\".containerd.runtimes.{class}]"));
    line("  runtime_type = \"io.containerd.runc.v2\"");
    line("  snapshotter = \"accel\"");
    if scope == Scope::Nvidia {
        line(&format!(
            "  [plugins.\"{cri}\".containerd.runtimes.{class}.options]"
        ));
        line("    BinaryName = \"/usr/bin/nvidia-container-runtime\"");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(version: &str, scope: Scope) -> Result<String, String> {
        let (socket, root) = (Path::new("/s"), Path::new("/r"));
        stanza(version.parse().unwrap(), scope, socket, root)
    }

    #[test]
    fn every_version_has_its_tables() {
        let old = made("1.6.20", Scope::Default).unwrap();
        assert!(
            old.contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd]"),
            "{old}"
        );
        assert!(!old.contains("exports"));
        let middle = made("1.7", Scope::RuntimeClass).unwrap();
        assert!(
            middle.contains("cri\".containerd.runtimes.runc-accel]"),
            "{middle}"
        );
        assert!(
            !middle.contains("\n  snapshotter = \"accel\"\n  disable"),
            "{middle}"
        );
        let new = made("2.1.9", Scope::Nvidia).unwrap();
        assert!(
            new.contains("version = 3") && new.contains("nvidia-container-runtime"),
            "{new}"
        );
        assert!(made("1.6", Scope::RuntimeClass).is_err());
        assert!("1.5".parse::<Containerd>().is_err());
    }
}
