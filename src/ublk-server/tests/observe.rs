//! What an operator sees of a daemon: metrics, the log, and what `status` says of how
//! an image got ready. Over FUSE on this machine; needs what `daemon.rs` needs.

mod common;

use accel_sys::HugePages;
use common::node::{Node, await_that, base, big, check_big, check_one, drop_caches, kill};
use common::{Stalled, publish_image};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Samples by name and labels, as written; the families with their types.
#[derive(Debug)]
struct Metrics {
    samples: BTreeMap<String, f64>,
    types: BTreeMap<String, String>,
}

impl Metrics {
    /// Reads the text format, and insists on its rules.
    fn parse(text: &str) -> Self {
        let (mut samples, mut types) = (BTreeMap::new(), BTreeMap::new());
        let mut family = String::new();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.is_empty() && help.ends_with('.'), "{line}");
                name.clone_into(&mut family);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name, family, "a type without a help");
                let before = types.insert(family.clone(), kind.to_owned());
                assert!(before.is_none(), "{family} comes twice");
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let bare = name.split('{').next().unwrap();
                let parts = ["", "_bucket", "_sum", "_count"];
                let ours = parts.iter().any(|part| bare == format!("{family}{part}"));
                assert!(ours, "{line} stands among samples of {family}");
                let before = samples.insert(name.to_owned(), value.parse().unwrap());
                assert!(before.is_none(), "{line} comes twice");
            }
        }
        Self { samples, types }
    }

    /// The sample of this name; with labels, if it has any, as they are written.
    fn get(&self, name: &str) -> f64 {
        let value = self.samples.get(name);
        *value.unwrap_or_else(|| panic!("{name} is not in {self:#?}"))
    }

    /// All samples of this name, whatever their labels.
    fn sum(&self, name: &str) -> f64 {
        let ours = |sample: &&String| sample.split('{').next() == Some(name);
        let names = self.samples.keys().filter(ours);
        names.map(|sample| self.samples[sample]).sum()
    }
}

fn metrics(node: &Node) -> Metrics {
    Metrics::parse(&node.ask(&["metrics"]))
}

/// The metrics that the documentation lists, without those of the parts that only
/// options bring: a disk cache, layers that are made again, block devices.
fn documented(optional: &[&str]) -> BTreeSet<String> {
    let text = include_str!("../../../ARCHITECTURE.md");
    let rows = text.lines().filter_map(|line| {
        let name = line.strip_prefix("| `")?.split('`').next()?;
        let ours = name.starts_with("image_accel_") || name.starts_with("process_");
        let mut parts = [
            "image_accel_disk_cache_",
            "image_accel_rema",
            "image_accel_poll",
        ]
        .iter();
        let part = parts.find(|part| name.starts_with(**part));
        let there = part.is_none_or(|part| optional.contains(part));
        (ours && there).then(|| name.to_owned())
    });
    rows.collect()
}

#[test]
fn a_disk_cache_is_in_the_metrics() {
    let mut made = None;
    let disk = tempfile::tempdir().unwrap();
    let further = [
        "--disk-cache".as_ref(),
        disk.path().as_os_str(),
        "--disk-cache-size".as_ref(),
        "1G".as_ref(),
    ];
    let node = Node::start_with(&further, |ufs| made = Some(big(ufs)));
    let (image, contents) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    let first = metrics(&node);
    // Twice what the memory holds: the second time some of it is on disk only.
    check_big(&root, &contents);
    await_that(|| {
        drop_caches();
        check_big(&root, &contents);
        metrics(&node).get("image_accel_disk_cache_hits_total") > 0.0
    });
    let last = metrics(&node);
    for name in ["hits_total", "misses_total", "written_total", "used_bytes"] {
        let name = format!("image_accel_disk_cache_{name}");
        assert!(last.get(&name) > first.get(&name), "{name} does not move");
    }
    assert_eq!(last.get("image_accel_disk_cache_in_use"), 1.0);
    let names: BTreeSet<_> = last.types.keys().cloned().collect();
    assert_eq!(names, documented(&["image_accel_disk_cache_"]));
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn every_metric_is_documented_and_moves() {
    let mut made = None;
    let further = ["--metrics", "127.0.0.1:0"].map(OsStr::new);
    let mut node = Node::start_with(&further, |ufs| {
        let (layer, files) = base(ufs);
        made = Some((
            big(ufs),
            publish_image(ufs, &[layer]).to_string(),
            layer,
            files,
        ));
    });
    let ((image, contents), small, layer, files) = made.unwrap();
    let first = metrics(&node);
    let names: BTreeSet<_> = first.types.keys().cloned().collect();
    let devices = |name: &&String| name.starts_with("image_accel_device_");
    let listed = documented(&[]);
    let without_devices: BTreeSet<_> = listed
        .iter()
        .filter(|name| !devices(name))
        .cloned()
        .collect();
    assert_eq!(names, without_devices, "not as documented");

    // Reads of files: twice as much as the cache holds, then what it holds.
    let (root, other) = (node.directory("root"), node.directory("other"));
    node.ask(&["mount", &image, &root]);
    check_big(&root, &contents);
    check_one(&root, 8, &contents[7]);
    node.ask(&["mount", &small, &other]);
    // Ten readers of one chunk that does not come, each of a page of its own.
    let worker = node.status()["sources"][0]["worker"].clone();
    let device = node.ask(&["attach", &layer.name.digest().to_string()]);
    let joined = || metrics(&node).get("image_accel_lookups_total{result=\"joined\"}");
    let before = joined();
    kill(&worker, Signal::STOP);
    drop_caches();
    std::thread::scope(|scope| {
        let path = Path::new(device.trim());
        let chunk = layer.size.bytes() / 2 / (128 << 10) * (128 << 10);
        for page in 0..10 {
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                file.read_exact_at(&mut [0; 512], chunk + page * 8192)
                    .unwrap();
            });
        }
        await_that(|| joined() >= before + 3.0);
        assert!(metrics(&node).get("image_accel_requests_in_flight") > 0.0);
        kill(&worker, Signal::CONT);
    });
    // The largest file's bytes are wrong, and right again.
    node.ask(&["unmount", &other]);
    node.ask(&["detach", &layer.name.digest().to_string()]);
    let (path, content) = files.last().unwrap();
    let file = layer.name.image().beneath(&node.path("ufs"));
    let stored = fs::read(&file).unwrap();
    let mut parts = stored.windows(64);
    let start = parts.position(|part| *part == content[..64]).unwrap();
    let mut wrong = stored.clone();
    wrong[start + content.len() / 2] ^= 1;
    fs::write(&file, wrong).unwrap();
    // Fills the cache with something else.
    check_big(&root, &contents);
    node.ask(&["mount", &small, &other]);
    drop_caches();
    fs::read(Path::new(&other).join(path)).unwrap_err();
    let damaged = metrics(&node);
    for name in [
        "image_accel_errors_total",
        "image_accel_digest_failures_total",
        "image_accel_failed_reads_total",
        "image_accel_device_errors_total",
        "image_accel_device_digest_failures_total",
        "image_accel_source_digest_failures_total",
        "image_accel_source_set_aside_total",
    ] {
        assert!(damaged.sum(name) > first.sum(name), "{name} does not move");
    }
    fs::write(&file, &stored).unwrap();
    assert!(fs::read(Path::new(&other).join(path)).unwrap() == *content);
    // A worker dies while it is asked.
    kill(&worker, Signal::STOP);
    drop_caches();
    std::thread::scope(|scope| {
        scope.spawn(|| check_big(&root, &contents[..1]));
        await_that(|| metrics(&node).get("image_accel_requests_in_flight") > 0.0);
        kill(&worker, Signal::KILL);
    });

    let last = metrics(&node);
    let names: BTreeSet<_> = last.types.keys().cloned().collect();
    assert_eq!(names, listed, "not as documented");
    // Those that move only when something else goes wrong: below.
    let later = [
        "image_accel_recovered_devices_total",
        "image_accel_source_failures_total",
        "process_cpu_seconds_total",
    ];
    for (name, kind) in &last.types {
        let sample = match &**kind {
            "histogram" => format!("{name}_count"),
            "counter" => name.clone(),
            _ => continue,
        };
        if !later.contains(&&**name) {
            assert!(
                last.sum(&sample) > first.sum(&sample),
                "{name} does not move"
            );
        }
    }
    for name in [
        "image_accel_devices",
        "image_accel_holders",
        "image_accel_cache_used_bytes{kind=\"chunk\"}",
        "image_accel_cache_used_bytes{kind=\"page\"}",
    ] {
        assert!(last.get(name) > first.get(name), "{name} does not move");
    }
    let huge = || metrics(&node).get("image_accel_cache_huge_bytes");
    match HugePages::probe() {
        Ok(()) => await_that(|| huge() > 0.0),
        Err(error) => {
            println!("the kernel makes no huge pages of shared memory: {error}");
            assert_eq!(huge(), 0.0);
        }
    }
    // What devices did is what all did, as long as none has ended since.
    assert!(last.sum("image_accel_device_requests_total") < last.sum("image_accel_requests_total"));
    // The same over HTTP.
    let log = node.log();
    let address = log
        .split("address=")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next();
    let address = address.unwrap().trim_end_matches("\u{1b}[0m");
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    let scraped = Metrics::parse(body);
    assert_eq!(scraped.types, last.types);
    assert!(scraped.get("image_accel_requests_total") >= last.get("image_accel_requests_total"));
    // The next daemon takes the devices over.
    node.kill_and_restart();
    let devices = metrics(&node).get("image_accel_devices");
    assert_eq!(
        metrics(&node).get("image_accel_recovered_devices_total"),
        devices
    );
    assert!(devices >= 2.0);
    assert_eq!(metrics(&node).get("image_accel_unrecovered_devices"), 0.0);
    node.ask(&["unmount", &other]);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn metrics_and_status_answer_while_ufs_is_stuck() {
    let stalled = Stalled::new();
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, contents) = made.unwrap();
    node.stall_ufs(&stalled);
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    let name = |metric: &str| {
        let path = node.path("ufs");
        format!(
            "image_accel_source_{metric}{{source=\"UFS {}\"}}",
            path.display()
        )
    };
    // Asked, silent, killed, and stuck: its death waits for the storage.
    await_that(|| {
        drop_caches();
        check_big(&root, &contents[..1]);
        metrics(&node).get(&name("workers_dying")) > 0.0
    });
    let metrics = metrics(&node);
    assert_eq!(metrics.get(&name("in_use")), 0.0);
    assert!(metrics.get(&name("failures_total")) > 0.0);
    assert_eq!(metrics.get("image_accel_failed_reads_total"), 0.0);
    // With the replica's worker stopped, too, nothing at all comes.
    let worker = node.status()["sources"][1]["worker"].clone();
    kill(&worker, Signal::STOP);
    std::thread::scope(|scope| {
        scope.spawn(|| check_one(&root, 5, &contents[4]));
        await_that(|| self::metrics(&node).get("image_accel_requests_in_flight") > 0.0);
        node.ask(&["status"]);
        node.ask(&["list"]);
        kill(&worker, Signal::CONT);
    });
    node.ask(&["unmount", &root]);
    node.stop();
}

/// The lines of the daemon's log, which are JSON.
fn lines(node: &Node) -> Vec<Value> {
    let log = node.log();
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
    log.lines().map(parse).collect()
}

#[test]
fn one_request_is_followed_by_its_id_and_damage_is_told_with_all_names() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (layer, files) = base(ufs);
        made = Some((layer, files));
    });
    let (layer, _) = made.unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    fs::remove_file(node.path("log")).unwrap();
    let log = File::options()
        .create(true)
        .append(true)
        .open(node.path("log"));
    let log = log.unwrap();
    // As `serve` does, and with everything in the log.
    node.child = std::process::Command::new(common::node::PROGRAM)
        .args(["--log-format", "json", "serve", "--transport", "fuse"])
        .arg("--ufs")
        .arg(node.path("ufs"))
        .arg("--socket")
        .arg(node.path("socket"))
        .env("RUST_LOG", "ublk_server=trace,accel_source=trace")
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    node.await_daemon();
    let digest = layer.name.digest().to_string();
    let path = node.ask(&["attach", &digest]);
    let chunk = 8;
    let offset = chunk * (128 << 10) + 8192;
    let file = File::open(path.trim()).unwrap();
    file.read_exact_at(&mut [0; 512], offset).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let read = |line: &&Value| {
        let fields = &line["fields"];
        let (at, len) = (fields["offset"].as_u64(), fields["len"].as_u64());
        let (at, len) = (at.unwrap_or(u64::MAX), len.unwrap_or(0));
        fields["message"] == "read" && at <= offset && offset < at.saturating_add(len)
    };
    await_that(|| lines(&node).iter().any(|line| read(&line)));
    let id = {
        let lines = lines(&node);
        text(&lines.iter().find(read).unwrap()["fields"]["request"])
    };
    assert!(id.contains('-'), "{id}");
    let ours = || -> Vec<Value> {
        let lines = lines(&node).into_iter();
        lines
            .filter(|line| line["fields"]["request"] == *id)
            .collect()
    };
    let said = |words: &str| ours().iter().any(|line| line["fields"]["message"] == words);
    await_that(|| said("answered to the kernel"));
    let ours = ours();
    let of_chunk: Vec<_> = ours
        .iter()
        .filter(|line| {
            !line["fields"]["file"]
                .as_str()
                .unwrap_or("")
                .ends_with(".idx")
        })
        .map(|line| (text(&line["target"]), text(&line["fields"]["message"])))
        .filter(|(_, message)| message != "not in memory")
        .collect();
    // From the queue thread to the source, its worker process, and back.
    let way = [
        ("ublk_server::engine", "read"),
        ("accel_source::sources", "asked"),
        ("accel_source::worker", "reads"),
        ("accel_source::worker", "has read"),
        ("accel_source::sources", "answered"),
        ("ublk_server::engine", "answered to the kernel"),
    ];
    let mut from = 0;
    for (target, message) in way {
        let at = of_chunk[from..]
            .iter()
            .position(|(in_target, said)| in_target.starts_with(target) && said == message);
        from += at.unwrap_or_else(|| panic!("no {message:?} of {target} in {ours:#?}")) + 1;
    }
    // Wrong bytes, in the same chunk of a layer that is attached anew.
    drop(file);
    node.ask(&["detach", &digest]);
    let image = layer.name.image().beneath(&node.path("ufs"));
    let stored = File::options().write(true).open(image).unwrap();
    let far = 16 * (128 << 10);
    stored.write_all_at(&[0xA5; 64], far + 4096).unwrap();
    let path = node.ask(&["attach", &digest]);
    File::open(path.trim())
        .unwrap()
        .read_exact_at(&mut [0; 512], far)
        .unwrap_err();
    let lines = lines(&node);
    let told = lines.iter().find(|line| {
        let message = line["fields"]["message"].as_str();
        message.unwrap_or_default().starts_with("digest mismatch")
    });
    let fields = &told.expect("nothing is told")["fields"];
    assert_eq!(fields["chunk"], 16, "{fields}");
    assert_eq!(text(&fields["layer"]), layer.name.to_string());
    assert!(text(&fields["file"]).ends_with(".erofs"), "{fields}");
    assert!(text(&fields["source"]).starts_with("UFS /"), "{fields}");
    assert!(text(&fields["request"]).contains('-'), "{fields}");
    node.ask(&["detach", &digest]);
    node.stop();
}

#[test]
fn status_says_what_it_took_until_an_image_was_ready() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let (layer, _) = base(ufs);
        let big = big(ufs).0;
        made = Some((publish_image(ufs, &[layer]).to_string(), big));
    });
    let (image, _) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    let ready = || node.status()["holders"][0]["ready"].clone();
    await_that(|| ready()["metadata_ms"].is_u64());
    let ready = ready();
    let number = |name: &str| ready[name].as_u64().unwrap();
    assert!(number("mounted_bytes") > 0 && number("metadata_ms") >= number("mounted_ms"));
    // Nothing else was read: so it is all that the source gave.
    let fetched = node.status()["fetched_bytes"].as_u64().unwrap();
    assert_eq!(number("mounted_bytes") + number("metadata_bytes"), fetched);
    let words = node.ask(&["status"]);
    assert!(words.contains("metadata complete after"), "{words}");
    node.ask(&["unmount", &root]);
    node.stop();
}
