//! The rest of a node: kernel, `ublk-server`, UFS, the snapshotter itself, and whether
//! the running containerd is what its configuration says. Values in, findings out.

use super::{Finding, Step};
use crate::config::NAME;
use crate::idmap;
use crate::status;
use accel_client::protocol;
use std::path::{Path, PathBuf};

/// The rules that keep udev from reading the layers' block devices.
pub const UDEV_RULES: &str = "59-image-accel.rules";

/// How a kernel has something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It is there.
    Present,
    /// As a module that is not loaded.
    Loadable,
    /// Not at all.
    Absent,
}

/// What was found at a Unix socket.
#[derive(Debug, Clone)]
pub struct Asked<T> {
    /// The socket.
    pub socket: PathBuf,
    /// The answer, or why there is none.
    pub answer: Result<T, String>,
}

/// What the running containerd says.
#[derive(Debug, Clone)]
pub struct Running {
    /// Its version.
    pub version: String,
    /// Whether this snapshotter is one of its plugins.
    pub knows_us: bool,
}

/// What there is to know of a node.
#[derive(Debug)]
pub struct Node {
    /// The kernel's release.
    pub release: String,
    /// `erofs`, `overlay`, `fuse`, and `ublk_drv`.
    pub erofs: Support,
    /// As above.
    pub overlay: Support,
    /// As above.
    pub fuse: Support,
    /// As above.
    pub ublk: Support,
    /// Loop devices, for files over FUSE before Linux 6.12.
    pub loops: Support,
    /// Version of this program.
    pub version: &'static str,
    /// `ublk-server`.
    pub server: Asked<protocol::Status>,
    /// The snapshotter.
    pub snapshotter: Asked<status::Status>,
    /// Owner and mode of its socket, if it is there.
    pub access: Option<(u32, u32)>,
    /// containerd.
    pub containerd: Asked<Running>,
    /// udev, if it runs: whether it has [`UDEV_RULES`].
    pub udev: Option<bool>,
    /// NVIDIA's runtime, if it is needed: whether it is there.
    pub nvidia: Option<bool>,
}

fn run(command: impl Into<String>) -> Step {
    Step::Run(command.into())
}

/// Judges a node.
pub fn examine(node: &Node) -> Vec<Finding> {
    let judged = [
        kernel(node),
        ublk(node),
        udev(node),
        server(node),
        ufs(node),
        snapshotter(node),
        lazy_layers(node),
        containerd(node),
    ];
    judged.into_iter().flatten().collect()
}

fn kernel(node: &Node) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, module, support) in [
        ("EROFS", "erofs", node.erofs),
        ("overlayfs", "overlay", node.overlay),
    ] {
        match support {
            Support::Present => {}
            Support::Loadable => findings.push(Finding::warning(
                "kernel",
                format!("{name} is not loaded; a mount loads it, if it may"),
                vec![
                    run(format!("modprobe {module}")),
                    run(format!("echo {module} >/etc/modules-load.d/{module}.conf")),
                ],
            )),
            Support::Absent => findings.push(Finding::fault(
                "kernel",
                format!("Linux {} has no {name}", node.release),
                vec![Step::Do(
                    "boot a kernel that has it; Debian's and Ubuntu's do".to_owned(),
                )],
            )),
        }
    }
    if findings.is_empty() {
        let what = format!("Linux {} with EROFS and overlayfs", node.release);
        findings.push(Finding::ok("kernel", what));
    }
    findings
}

fn ublk(node: &Node) -> Vec<Finding> {
    let transport = node.server.answer.as_ref().ok();
    let transport = transport.map(|status| status.transport.as_str());
    let finding = match (node.ublk, transport) {
        (Support::Present, Some("fuse")) => Finding::warning(
            "ublk",
            "the kernel has ublk, but ublk-server uses FUSE: it was started before, or told to",
            vec![run("systemctl restart ublk-server")],
        ),
        (Support::Present, _) => Finding::ok("ublk", "the kernel has it"),
        (Support::Loadable, _) => Finding::fault(
            "ublk",
            "the module ublk_drv is not loaded",
            vec![
                run("modprobe ublk_drv"),
                run("echo ublk_drv >/etc/modules-load.d/ublk_drv.conf"),
                run("systemctl restart ublk-server"),
            ],
        ),
        (Support::Absent, _) => {
            let release = &node.release;
            let old = idmap::version(release).is_none_or(|version| version < (6, 12));
            if node.fuse == Support::Absent {
                Finding::fault(
                    "ublk",
                    format!("Linux {release} has neither ublk nor FUSE"),
                    vec![Step::Do(
                        "boot a kernel with ublk, Linux 6.5 or later".to_owned(),
                    )],
                )
            } else if old && node.loops == Support::Absent {
                Finding::fault(
                    "ublk",
                    format!(
                        "Linux {release} has no ublk, and no loop devices to mount files from FUSE"
                    ),
                    vec![Step::Do("boot a kernel with either".to_owned())],
                )
            } else {
                Finding::warning(
                    "ublk",
                    format!("Linux {release} has no ublk: layers come over FUSE, which is slower"),
                    vec![Step::Do(
                        "for ublk boot Linux 6.5 or later with CONFIG_BLK_DEV_UBLK; Debian's 6.12 has it"
                            .to_owned(),
                    )],
                )
            }
        }
    };
    vec![finding]
}

fn udev(node: &Node) -> Vec<Finding> {
    const CHECK: &str = "udev";
    let over_ublk = |status: &protocol::Status| status.transport == "ublk";
    let finding = match node.udev {
        Some(true) => Finding::ok(CHECK, "it leaves the layers' block devices alone"),
        Some(false) if node.server.answer.as_ref().is_ok_and(over_ublk) => Finding::warning(
            CHECK,
            format!(
                "{UDEV_RULES} is missing: newer versions of udev read every layer's block device, \
                 and what they read comes from UFS"
            ),
            vec![
                Step::Do(format!(
                    "install deploy/udev/{UDEV_RULES} of this version in /etc/udev/rules.d"
                )),
                run("udevadm control --reload"),
            ],
        ),
        Some(false) | None => return Vec::new(),
    };
    vec![finding]
}

fn server(node: &Node) -> Vec<Finding> {
    const CHECK: &str = "ublk-server";
    let socket = node.server.socket.display();
    let finding = match &node.server.answer {
        Err(why) => Finding::fault(
            CHECK,
            format!("it does not answer at {socket}: {why}"),
            vec![
                run("systemctl enable ublk-server"),
                run("systemctl restart ublk-server"),
            ],
        ),
        Ok(status) if !status.verifies => Finding::fault(
            CHECK,
            "this build does not compare what it reads with its digest: it is for one test",
            vec![
                Step::Do("install a release build".to_owned()),
                run("systemctl restart ublk-server"),
            ],
        ),
        Ok(status) if status.version != node.version => Finding::warning(
            CHECK,
            format!(
                "version {} runs beside a snapshotter of version {}",
                status.version, node.version
            ),
            vec![
                Step::Do("install the same version of both".to_owned()),
                run("systemctl restart ublk-server"),
            ],
        ),
        Ok(status) => Finding::ok(
            CHECK,
            format!("version {}, over {}", status.version, status.transport),
        ),
    };
    vec![finding]
}

fn ufs(node: &Node) -> Vec<Finding> {
    const CHECK: &str = "ufs";
    let Ok(status) = &node.server.answer else {
        return Vec::new();
    };
    let mut findings: Vec<_> = status
        .sources
        .iter()
        .filter(|source| !source.in_use)
        .map(|source| {
            let what = format!("{} is not in use: {}", source.name, source.state);
            let mend = vec![Step::Do(format!(
                "see that it is mounted and answers: findmnt --target {0}; ls {0}/layers",
                status.ufs.display()
            ))];
            match status.sources.iter().any(|source| source.in_use) {
                true => Finding::warning(CHECK, what, mend),
                false => Finding::fault(CHECK, what, mend),
            }
        })
        .collect();
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, status.ufs.display().to_string()));
    }
    findings
}

fn snapshotter(node: &Node) -> Vec<Finding> {
    const CHECK: &str = "snapshotter";
    let socket = node.snapshotter.socket.display();
    let mut findings = Vec::new();
    match &node.snapshotter.answer {
        Err(why) => findings.push(Finding::fault(
            CHECK,
            format!("it does not answer at {socket}: {why}"),
            vec![
                run("systemctl enable accel-snapshotter"),
                run("systemctl restart accel-snapshotter"),
            ],
        )),
        Ok(status) => {
            if status.version != node.version {
                findings.push(Finding::warning(
                    CHECK,
                    format!(
                        "version {} runs, {} is installed",
                        status.version, node.version
                    ),
                    vec![run("systemctl restart accel-snapshotter")],
                ));
            }
            if !same_path(&status.server, &node.server.socket) {
                findings.push(Finding::fault(
                    CHECK,
                    format!(
                        "it asks ublk-server at {}, not at {}",
                        status.server.display(),
                        node.server.socket.display()
                    ),
                    vec![Step::Do(format!(
                        "start it with --server {}",
                        node.server.socket.display()
                    ))],
                ));
            }
        }
    }
    if let (Ok(status), Ok(server)) = (&node.snapshotter.answer, &node.server.answer)
        && let Some(ufs) = &status.ufs
        && *ufs != server.ufs
    {
        findings.push(Finding::fault(
            CHECK,
            format!(
                "it takes layers from the UFS {} only, but ublk-server reads {}",
                ufs.display(),
                server.ufs.display()
            ),
            vec![
                Step::Do("give both the same --ufs".to_owned()),
                run("systemctl restart ublk-server"),
                run("systemctl restart accel-snapshotter"),
            ],
        ));
    }
    if let Some((owner, mode)) = node.access
        && (owner != 0 || mode & 0o077 != 0)
    {
        findings.push(Finding::fault(
            CHECK,
            format!("others than root may use its socket {socket}"),
            vec![
                run(format!("chown root:root {socket}")),
                run(format!("chmod 600 {socket}")),
            ],
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("it answers at {socket}")));
    }
    findings
}

fn same_path(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

fn lazy_layers(node: &Node) -> Vec<Finding> {
    let Ok(status) = &node.snapshotter.answer else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let missing = status.layers.iter().filter(|layer| !layer.mounted);
    let missing = missing.filter(|layer| layer.snapshots > 0).count();
    if missing > 0 {
        findings.push(Finding::fault(
            "lazy-layers",
            format!("{missing} layers are not mounted: containers of their images do not start"),
            vec![Step::Do(
                "they are mounted as soon as ublk-server and UFS answer; see the snapshotter's log"
                    .to_owned(),
            )],
        ));
    }
    if status.fallbacks > 0 {
        let reasons: Vec<_> = status
            .fallback_reasons
            .iter()
            .map(|(reason, number)| format!("{reason} {number}"))
            .collect();
        findings.push(Finding::warning(
            "fallbacks",
            format!(
                "{} layers of accelerated images were downloaded since the start: {}",
                status.fallbacks,
                reasons.join(", ")
            ),
            vec![Step::Do(
                "`accel-snapshotter status` says which and why".to_owned(),
            )],
        ));
    }
    findings
}

fn containerd(node: &Node) -> Vec<Finding> {
    const CHECK: &str = "containerd";
    let socket = node.containerd.socket.display();
    let mut findings = vec![match &node.containerd.answer {
        Err(why) => Finding::fault(
            CHECK,
            format!("it does not answer at {socket}: {why}"),
            vec![run("systemctl restart containerd")],
        ),
        Ok(running) if !running.knows_us => Finding::fault(
            CHECK,
            format!("it runs without the snapshotter {NAME}: its configuration is newer than it"),
            vec![run("systemctl restart containerd")],
        ),
        Ok(running) => Finding::ok(CHECK, format!("version {}", running.version)),
    }];
    if node.nvidia == Some(false) {
        findings.push(Finding::fault(
            "runtime-handler",
            format!("{} is missing", crate::config::NVIDIA),
            vec![Step::Do(
                "install NVIDIA's container toolkit, or name its runtime in BinaryName".to_owned(),
            )],
        ));
    }
    findings
}
