//! The distributed cases over sockets, and what only sockets can do wrong.

use super::cases::{self, Group};
use candle_core::{DType, Device, Result, Tensor};
use candle_norm::distributed::{ProcessGroup, TcpGroup};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(60);

/// A port that was free a moment ago.
fn address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Runs `f` on threads that reach each other over sockets only.
fn run<T: Send>(ranks: usize, timeout: Duration, f: impl Fn(TcpGroup) -> T + Sync) -> Vec<T> {
    let (address, f) = (address(), &f);
    std::thread::scope(|scope| {
        let one = |rank| {
            let address = &address;
            scope.spawn(move || f(TcpGroup::connect(address, rank, ranks, timeout).unwrap()))
        };
        let threads: Vec<_> = (0..ranks).map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_case_over_tcp() {
    for ranks in [1, 2, 3] {
        let outcomes = run(ranks, TIMEOUT, |group| -> Result<()> {
            let group: Group = Arc::new(group);
            cases::ALL.iter().try_for_each(|(_, case)| case(&group))
        });
        for outcome in outcomes {
            outcome.unwrap_or_else(|e| panic!("{ranks} ranks: {e}"));
        }
    }
}

fn call(group: &TcpGroup) -> String {
    let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    group.all_gather("x", &one).map_or_else(|e| e.to_string(), |_| "fine".to_string())
}

/// Whichever rank leaves, the others hear it long before the timeout, and whose fault it is.
#[test]
fn tcp_rank_that_leaves_fails_its_peers() {
    for leaver in [0, 2] {
        let start = Instant::now();
        let heard = run(3, TIMEOUT, |group| match call(&group) {
            first if group.rank() == leaver => (first, String::new(), String::new()),
            first => (first, call(&group), call(&group)),
        });
        for (rank, (first, second, third)) in heard.iter().enumerate() {
            assert_eq!(first, "fine");
            if rank != leaver {
                assert!(second.contains(&format!("rank {leaver} left the group")), "{second}");
                assert_eq!(third, second);
            }
        }
        assert!(start.elapsed() < TIMEOUT / 2);
    }
}

#[test]
fn tcp_rank_that_stays_away_is_waited_for_no_longer_than_said() {
    let (timeout, start) = (Duration::from_millis(300), Instant::now());
    let heard = run(2, timeout, |group| {
        if group.rank() == 1 {
            std::thread::sleep(timeout * 4);
            return String::new();
        }
        call(&group)
    });
    assert!(heard[0].contains("rank 1 did not join all-gather of F32 [1]: x within 300ms"), "{}", heard[0]);
    assert!(start.elapsed() < TIMEOUT / 2);
}

#[test]
fn tcp_strangers_are_ignored_and_missing_ranks_named() {
    let address = address();
    let group = std::thread::scope(|scope| {
        let rank0 = scope.spawn(|| TcpGroup::connect(&address, 0, 2, TIMEOUT));
        let mut stranger = loop {
            match TcpStream::connect(&address) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n").unwrap();
        let rank1 = TcpGroup::connect(&address, 1, 2, TIMEOUT).unwrap();
        (rank0.join().unwrap().unwrap(), rank1)
    });
    assert_eq!((group.0.rank(), group.1.rank()), (0, 1));

    let error = TcpGroup::connect(&self::address(), 0, 2, Duration::from_millis(100)).unwrap_err();
    assert!(error.to_string().contains("waited 100ms for rank 1"), "{error}");
    let error = TcpGroup::connect(&self::address(), 1, 2, Duration::from_millis(100)).unwrap_err();
    assert!(error.to_string().contains("waited 100ms for rank 0 at"), "{error}");
    assert!(TcpGroup::connect("127.0.0.1:1", 2, 2, TIMEOUT).is_err());
}

/// The environment is the process's, so this runs in processes of its own.
#[test]
fn tcp_group_from_the_environment() {
    const TEST: &str = "distributed::tcp::tcp_group_from_the_environment";
    if std::env::var("RANK").is_ok() {
        assert_eq!(call(&TcpGroup::from_env().unwrap()), "fine");
        return;
    }
    let (host, port) = address().rsplit_once(':').map(|(h, p)| (h.to_string(), p.to_string())).unwrap();
    let start = |rank: usize| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST])
            .envs([
                ("RANK", &*rank.to_string()),
                ("WORLD_SIZE", "3"),
                ("MASTER_ADDR", &host),
                ("MASTER_PORT", &port),
            ])
            .output()
            .unwrap()
    };
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..3).map(|rank| scope.spawn(move || start(rank))).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for output in outputs {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}
