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
    /// 2.0: as 2.1, but the CRI does not pull through the transfer service
    V2_0,
    /// 2.1 and later
    V2_1,
}

impl FromStr for Containerd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split('.').collect::<Vec<_>>().as_slice() {
            ["1", "6", ..] => Ok(Self::V1_6),
            ["1", "7", ..] => Ok(Self::V1_7),
            ["2", "0", ..] => Ok(Self::V2_0),
            ["2", ..] => Ok(Self::V2_1),
            _ => Err("containerd 1.6, 1.7 and 2.x are known".to_owned()),
        }
    }
}

impl Containerd {
    /// The plugin that has what is about runtimes.
    pub const fn runtime_plugin(self) -> &'static str {
        match self {
            Self::V1_6 | Self::V1_7 => CRI_1,
            Self::V2_0 | Self::V2_1 => "io.containerd.cri.v1.runtime",
        }
    }

    /// The plugin that has what is about images, and its table for that.
    pub const fn image_table(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::V1_6 | Self::V1_7 => (CRI_1, Some("containerd")),
            Self::V2_0 | Self::V2_1 => ("io.containerd.cri.v1.images", None),
        }
    }

    /// Version of the format that its configuration has.
    pub const fn format(self) -> i64 {
        match self {
            Self::V1_6 | Self::V1_7 => 2,
            Self::V2_0 | Self::V2_1 => 3,
        }
    }
}

/// The plugin of 1.x that has all of the CRI.
pub const CRI_1: &str = "io.containerd.grpc.v1.cri";
/// The plugin that pulls for `ctr` from 2.0 on, and for the CRI from 2.1 on.
pub const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// Name of this snapshotter in containerd.
pub const NAME: &str = "accel";

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

impl Scope {
    /// The runtime of the class, if it has one of its own.
    pub const fn runtime(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::RuntimeClass => Some("runc-accel"),
            Self::Nvidia => Some("nvidia-accel"),
        }
    }
}

/// What the text is for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Which containerd.
    pub version: Containerd,
    /// For which pods.
    pub scope: Scope,
    /// Where the snapshotter listens.
    pub socket: &'a Path,
    /// Its root directory.
    pub root: &'a Path,
    /// The CRI of 2.1 and later pulls as that of 2.0 does, not through the transfer
    /// service.
    pub local_pull: bool,
    /// The kernel can map ids of overlays over EROFS.
    pub maps_ids: bool,
}

/// The text, or why there is none.
pub fn stanza(wanted: &Wanted<'_>) -> Result<String, String> {
    let Wanted { version, scope, .. } = *wanted;
    if version == Containerd::V1_6 && scope != Scope::Default {
        return Err(
            "containerd 1.6 has one snapshotter for all pods; runtime classes with their own need 1.7"
                .to_owned(),
        );
    }
    let old = version <= Containerd::V1_7;
    // Through the transfer service; `disable_snapshot_annotations = false` would be
    // the other way.
    let transfers = version == Containerd::V2_1 && !wanted.local_pull;
    let mut text = String::new();
    let mut line = |line: &str| {
        // Into a String: cannot fail.
        let _ = writeln!(text, "{line}");
    };
    if old {
        line("# Into /etc/containerd/config.toml itself, each line into the table of that name");
        line("# if there is one: a drop-in would replace everything else of the CRI plugin.");
    } else {
        line("# Into /etc/containerd/conf.d/accel.toml, if the main file has");
        line("# imports = [\"/etc/containerd/conf.d/*.toml\"], or into the main file itself.");
    }
    line(&format!("version = {}", version.format()));
    line("");
    line("[proxy_plugins.accel]");
    line("  type = \"snapshot\"");
    line(&format!(
        "  address = {:?}",
        wanted.socket.to_string_lossy()
    ));
    if !old && wanted.maps_ids {
        line(
            "  # Pods with hostUsers: false get id-mapped mounts, not changed copies of all files.",
        );
        line("  capabilities = [\"remap-ids\"]");
    }
    if version != Containerd::V1_6 {
        // 1.6 looks in its own root directory, where ours is by default.
        line("  [proxy_plugins.accel.exports]");
        line(&format!("    root = {:?}", wanted.root.to_string_lossy()));
        if !old {
            line("    enable_remote_snapshot_annotations = \"true\"");
        }
    }
    line("");
    line(&match version.image_table() {
        (plugin, Some(table)) => format!("[plugins.\"{plugin}\".{table}]"),
        (plugin, None) => format!("[plugins.\"{plugin}\"]"),
    });
    if scope == Scope::Default {
        line("  snapshotter = \"accel\"");
    }
    if !transfers {
        line("  disable_snapshot_annotations = false");
    }
    if version == Containerd::V2_1 && wanted.local_pull {
        line("  use_local_image_pull = true");
    }
    if !old {
        line("");
        line("# `ctr images pull`, and from 2.1 on the CRI, pull through this. The list replaces");
        line("# containerd's own, which has overlayfs only.");
        for snapshotter in [NAME, "overlayfs"] {
            line(&format!("[[plugins.\"{TRANSFER}\".unpack_config]]"));
            line("  platform = \"linux\"");
            line(&format!("  snapshotter = \"{snapshotter}\""));
            line("  differ = \"walking\"");
        }
    }
    if let Some(class) = scope.runtime() {
        let table = format!(
            "plugins.\"{}\".containerd.runtimes.{class}",
            version.runtime_plugin()
        );
        if old {
            line("");
            line(
                "# Once a runtime is named, 1.7 has no other of itself. Leave this out if there is",
            );
            line("# one already, whatever it is called.");
            line(&format!("[plugins.\"{CRI_1}\".containerd.runtimes.runc]"));
            line("  runtime_type = \"io.containerd.runc.v2\"");
        }
        line("");
        line(&format!("[{table}]"));
        line("  runtime_type = \"io.containerd.runc.v2\"");
        line("  snapshotter = \"accel\"");
        if scope == Scope::Nvidia {
            line(&format!("  [{table}.options]"));
            line(&format!("    BinaryName = {NVIDIA:?}"));
        }
        if let (plugin, None) = version.image_table() {
            // What pulls has a table of its own.
            line(&format!("[plugins.\"{plugin}\".runtime_platforms.{class}]"));
            line("  platform = \"linux\"");
            line("  snapshotter = \"accel\"");
        }
    }
    Ok(text)
}

/// NVIDIA's runtime, where its package puts it.
pub const NVIDIA: &str = "/usr/bin/nvidia-container-runtime";

#[cfg(test)]
mod tests {
    use super::*;

    fn made(version: &str, scope: Scope, local_pull: bool) -> Result<String, String> {
        stanza(&Wanted {
            version: version.parse().unwrap(),
            scope,
            socket: Path::new("/s"),
            root: Path::new("/r"),
            local_pull,
            maps_ids: true,
        })
    }

    #[test]
    fn every_version_has_its_tables() {
        let old = made("1.6.20", Scope::Default, false).unwrap();
        let table = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]";
        assert!(old.contains(table), "{old}");
        assert!(!old.contains("exports") && !old.contains("unpack_config"));
        let middle = made("1.7", Scope::RuntimeClass, false).unwrap();
        let table = "cri\".containerd.runtimes.runc-accel]";
        assert!(middle.contains(table), "{middle}");
        let default = "\n  snapshotter = \"accel\"\n  disable";
        assert!(!middle.contains(default), "{middle}");
        for word in ["remap-ids", "unpack_config"] {
            assert!(!middle.contains(word), "1.x does not need it: {middle}");
        }
        assert!(middle.contains("runtimes.runc]"), "{middle}");
        let new = made("2.1.9", Scope::Nvidia, false).unwrap();
        let words = ["version = 3", "nvidia-container-runtime", "remap-ids"];
        assert!(words.iter().all(|word| new.contains(word)), "{new}");
        assert!(!new.contains("disable_snapshot_annotations"), "{new}");
        let local = made("2.1", Scope::Default, true).unwrap();
        assert!(local.contains("use_local_image_pull = true"), "{local}");
        let zero = made("2.0.1", Scope::Default, false).unwrap();
        let option = "disable_snapshot_annotations = false";
        assert!(zero.contains(option) && local.contains(option), "{zero}");
        assert!(made("1.6", Scope::RuntimeClass, false).is_err());
        assert!("1.5".parse::<Containerd>().is_err());
        for text in [old, middle, new, local, zero] {
            text.parse::<toml::Table>().unwrap();
        }
    }
}
