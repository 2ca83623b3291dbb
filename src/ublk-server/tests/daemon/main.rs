//! The whole daemon over FUSE on this machine: serve, mount, read, damage, unmount.
//! Needs root, FUSE, overlayfs, EROFS and Debian's mkfs.erofs.

#[path = "../common/mod.rs"]
mod common;
mod deaths;
mod stalls;

use common::node::{Node, PROGRAM, await_that, base, big, drop_caches, field, serve};
use common::{Entry, name_index, publish_image, publish_tree};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use ublk_server::threads::COUNT;

#[test]
fn an_image_is_mounted_read_and_unmounted() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let (base, files) = base(ufs);
        let top: &[Entry<'_>] = &[("etc/name", Some(b"top\n")), ("etc/more", Some(b"x"))];
        let top = publish_tree(ufs, "top", top);
        let both = publish_image(ufs, &[base, top]);
        let only = publish_image(ufs, &[base]);
        made = Some((both, name_index(ufs, only), files));
    });
    let (both, only, files) = made.unwrap();
    let (one, two) = (node.directory("one"), node.directory("two"));
    node.ask(&["mount", &both.to_string(), &one]);
    node.ask(&["mount", &only.to_string(), &two]);
    drop_caches();
    for (path, content) in &files {
        for root in [&one, &two] {
            assert!(
                fs::read(Path::new(root).join(path)).unwrap() == *content,
                "{root}/{path}"
            );
        }
    }
    let name = |root: &str| fs::read_to_string(Path::new(root).join("etc/name")).unwrap();
    assert_eq!(
        (name(&one).as_str(), name(&two).as_str()),
        ("top\n", "base\n")
    );
    let error = fs::write(Path::new(&one).join("etc/name"), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(node.ask(&["list"]).contains(&one));
    let status = node.status();
    assert_eq!(status["transport"], "fuse");
    assert_eq!(
        status["exports"].as_array().unwrap().len(),
        2,
        "the base is shared"
    );
    assert!(status["exports"][0]["trust"] == "ufs" && status["fetched_bytes"].as_u64() > Some(0));
    // The same directory twice, and a busy one.
    assert!(
        node.refused(&["mount", &both.to_string(), &one])
            .contains(&one)
    );
    let held = File::open(Path::new(&one).join("etc/name")).unwrap();
    assert!(node.refused(&["unmount", &one]).contains("in use"));
    drop(held);
    node.ask(&["unmount", &one]);
    drop_caches();
    assert_eq!(name(&two), "base\n");
    node.ask(&["unmount", &two]);
    assert!(node.refused(&["unmount", &two]).contains(&two));
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    node.stop();
}

#[test]
fn changes_go_to_the_upper_directory() {
    let mut image = None;
    let node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    let (root, upper) = (node.directory("root"), node.path("up,per:dir"));
    let upper = upper.to_str().unwrap();
    node.ask(&["mount", &image, &root, "--rw", upper]);
    fs::write(Path::new(&root).join("etc/name"), "mine\n").unwrap();
    fs::remove_file(Path::new(&root).join("data/1")).unwrap();
    node.ask(&["unmount", &root]);
    let changed = Path::new(upper).join("upper/etc/name");
    assert_eq!(fs::read_to_string(changed).unwrap(), "mine\n");
    node.ask(&["mount", &image, &root, "--rw", upper]);
    assert_eq!(
        fs::read_to_string(Path::new(&root).join("etc/name")).unwrap(),
        "mine\n"
    );
    assert!(!Path::new(&root).join("data/1").exists());
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn an_attached_layer_is_a_file_with_its_bytes() {
    let mut layer = None;
    let node = Node::start(|ufs| layer = Some(base(ufs).0));
    let layer = layer.unwrap();
    let digest = layer.name.digest().to_string();
    for _ in 0..2 {
        let path = node.ask(&["attach", &digest]);
        let expected = fs::read(layer.name.image().beneath(&node.path("ufs"))).unwrap();
        assert!(fs::read(path.trim()).unwrap() == expected);
        assert_eq!(node.ask(&["attach", &digest]), path, "attached once");
        node.ask(&["detach", &digest]);
        assert!(!Path::new(path.trim()).exists());
    }
    assert!(node.refused(&["detach", &digest]).contains(&digest));
    node.stop();
}

#[test]
fn damage_is_an_error_where_it_is_touched_and_heals() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let (layer, files) = base(ufs);
        made = Some((publish_image(ufs, &[layer]), layer, files));
    });
    let (image, layer, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image.to_string(), &root]);
    let (path, content) = files.last().unwrap();
    let file = layer.name.image().beneath(&node.path("ufs"));
    let stored = fs::read(&file).unwrap();
    let start = stored
        .windows(64)
        .position(|window| *window == content[..64])
        .unwrap();
    // In the middle of the file: its neighbours share no chunk with it.
    let at = start + content.len() / 2;
    let patch = |byte: u8| {
        let file = File::options().write(true).open(&file).unwrap();
        file.write_all_at(&[byte], at as u64).unwrap();
    };
    drop_caches();
    patch(stored[at] ^ 0x10);
    let victim = File::open(Path::new(&root).join(path)).unwrap();
    let mut byte = [0];
    let error = victim
        .read_exact_at(&mut byte, (at - start) as u64)
        .unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    let mut first = vec![0; 4096];
    victim.read_exact_at(&mut first, 0).unwrap();
    assert!(first == content[..4096]);
    for (path, content) in &files[..files.len() - 1] {
        assert!(
            fs::read(Path::new(&root).join(path)).unwrap() == *content,
            "{path}"
        );
    }
    let log = fs::read_to_string(node.path("log")).unwrap();
    for part in ["ERROR", &layer.name.to_string(), ".erofs", "UFS"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    patch(stored[at]);
    assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    // The second half of the image is gone, for a while. A new daemon has none of
    // it in its cache.
    drop(victim);
    node.ask(&["unmount", &root]);
    let node = node.restart();
    node.ask(&["mount", &image.to_string(), &root]);
    let victim = File::open(Path::new(&root).join(path)).unwrap();
    let short = File::options().write(true).open(&file).unwrap();
    short.set_len(at as u64).unwrap();
    drop_caches();
    victim.read_exact_at(&mut first, 0).unwrap();
    assert!(first == content[..4096]);
    assert!(
        victim
            .read_exact_at(&mut byte, (at - start) as u64 + 300_000)
            .is_err()
    );
    fs::write(&file, &stored).unwrap();
    assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    drop(victim);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn readers_do_not_notice_killed_workers() {
    let mut made = None;
    let node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    drop_caches();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A worker is killed once it has read something, and not more than 20
            // are: on a slow machine the reader would hardly get anywhere.
            let (mut reads, mut kills) = (0, 0);
            while !over.load(Relaxed) && kills < 20 {
                let source = &node.status()["sources"][0];
                let now = source["reads"].as_u64().unwrap();
                if let Some(pid) = source["worker"].as_i64()
                    && now > reads
                {
                    (reads, kills) = (now, kills + 1);
                    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                    // It may have been replaced meanwhile.
                    let _ = kill_process(pid, Signal::KILL);
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        for (number, content) in (1..).zip(&files) {
            let path = Path::new(&root).join(format!("f{number}"));
            assert!(fs::read(path).unwrap() == *content);
        }
        over.store(true, Relaxed);
    });
    let workers = node.status()["sources"][0]["workers"].as_u64().unwrap();
    assert!(workers > 1, "no worker was killed");
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn more_layers_than_an_option_string_holds() {
    let mut image = None;
    let node = Node::start(|ufs| {
        let layers: Vec<_> = (0..180)
            .map(|number| {
                let (name, text) = (format!("file{number}"), number.to_string());
                let entries: [Entry<'_>; 2] =
                    [(&name, Some(b"x")), ("last", Some(text.as_bytes()))];
                publish_tree(ufs, &name, &entries)
            })
            .collect();
        image = Some(publish_image(ufs, &layers));
    });
    let root = node.directory("root");
    node.ask(&["mount", &image.unwrap().to_string(), &root]);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 181);
    assert_eq!(
        fs::read_to_string(Path::new(&root).join("last")).unwrap(),
        "179"
    );
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_second_daemon_is_refused_and_a_dead_ones_mounts_can_be_taken_back() {
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    let second = Command::new(PROGRAM)
        .arg("serve")
        .arg("--ufs")
        .arg(node.path("ufs"))
        .arg("--socket")
        .arg(node.path("socket"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let message = String::from_utf8(second.stderr).unwrap();
    assert!(
        message.contains(node.path("socket").to_str().unwrap()),
        "{message}"
    );
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    assert!(node.client(&["unmount", &root]).status.success());
    assert_eq!(node.mounts(), [""; 0]);
    // The dead daemon's socket and lock are in nobody's way.
    node.child = serve(node.directory.path());
    node.await_daemon();
    node.ask(&["mount", &image, &root]);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn wrong_usage_says_what_is_wrong() {
    let mut image = None;
    let node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let root = node.directory("root");
    let unknown = format!("sha256:{}", "0".repeat(64));
    for (words, parts) in [
        (
            &["mount", &unknown, &root][..],
            &[unknown.as_str(), "mkfs-accel convert"][..],
        ),
        (&["mount", "oci:/none:x", &root], &["oci:/none:x"]),
        (&["mount", "nonsense", &root], &["nonsense"]),
        (
            &["mount", &image.unwrap().to_string(), "/none/such"],
            &["/none/such"],
        ),
        (&["unmount", "/"], &["no image is mounted at /"]),
    ] {
        let message = node.refused(words);
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    node.stop();
}

/// The threads of this name that a process has, as directories in /proc.
fn threads(process: u32, name: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let tasks = tasks.map(|task| format!("{process}/task/{task}"));
    // One may have ended since.
    let name = format!("{name}\n");
    let has_it = |task: &String| {
        fs::read_to_string(format!("/proc/{task}/comm")).is_ok_and(|comm| comm == name)
    };
    tasks.filter(has_it).collect()
}

/// What is left for everything else where a thread wants two of them.
const HALF_A_STACK: u64 = 1 << 20;

/// Leaves a process so many bytes more than it has; `None`: all that there is.
fn limit_memory(process: u32, left: Option<u64>) {
    let size = field(&process.to_string(), "VmSize");
    let size: u64 = size.trim_end_matches(" kB").trim().parse().unwrap();
    let pid = Pid::from_raw(i32::try_from(process).unwrap());
    let limit = Rlimit {
        current: left.map(|left| (size << 10) + left),
        maximum: getrlimit(Resource::As).maximum,
    };
    prlimit(pid, Resource::As, limit).unwrap();
}

#[test]
fn clients_need_no_new_thread() {
    let node = Node::start(|ufs| {
        base(ufs);
    });
    let daemon = node.processes()[0];
    let idle: Vec<_> = (0..COUNT / 2)
        .map(|_| UnixStream::connect(node.path("socket")).unwrap())
        .collect();
    // Served after those.
    assert_eq!(node.status()["transport"], "fuse");
    assert_eq!(threads(daemon, "admin"), [] as [String; 0]);
    drop(idle);
}

/// Memory may be too short for the stack of a thread.
#[test]
fn clients_ask_again_while_no_thread_can_be_made() {
    let node = Node::start(|ufs| {
        base(ufs);
    });
    let daemon = node.processes()[0];
    // These clients have all threads that there are, and as many new ones: stacks of threads
    // that have ended are kept and used again.
    let idle: Vec<_> = (0..2 * COUNT)
        .map(|_| UnixStream::connect(node.path("socket")).unwrap())
        .collect();
    await_that(|| threads(daemon, "admin").len() >= COUNT);
    limit_memory(daemon, Some(HALF_A_STACK));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| node.status());
        await_that(|| node.log().contains("which is to ask again"));
        limit_memory(daemon, None);
        assert_eq!(asked.join().unwrap()["transport"], "fuse");
    });
    drop(idle);
}
