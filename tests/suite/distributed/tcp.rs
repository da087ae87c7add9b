//! The distributed cases over sockets, and what only sockets can do wrong.

use super::cases::{self, Group};
use crate::common::process_for;
use candle_core::{DType, Device, Result, Tensor};
use candle_norm::distributed::{ProcessGroup, TcpGroup};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const TIMEOUT: Duration = Duration::from_secs(60);

/// A port that was free a moment ago.
pub fn address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Runs `f` on threads that reach each other over sockets only.
fn run<T: Send>(ranks: usize, timeout: Duration, f: impl Fn(TcpGroup) -> T + Sync) -> Vec<T> {
    let (address, f) = (address(), &f);
    std::thread::scope(|scope| {
        let one = |rank| {
            let address = &address;
            scope.spawn(move || f(TcpGroup::connect(address, TOKEN, rank, ranks, timeout).unwrap()))
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

/// A connection to rank 0, once it listens.
fn knock(address: &str) -> TcpStream {
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Silent ones, talkative ones, and one that says half a greeting: the job starts as if they were not there.
#[test]
fn tcp_strangers_hold_up_nobody() {
    let (address, start) = (address(), Instant::now());
    let (group, _strangers) = std::thread::scope(|scope| {
        let rank0 = scope.spawn(|| TcpGroup::connect(&address, TOKEN, 0, 2, TIMEOUT));
        let mut strangers: Vec<TcpStream> = (0..300).map(|_| knock(&address)).collect();
        strangers[0].write_all(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n").unwrap();
        strangers[1].write_all(&greeting(1, 2, TOKEN)[..30]).unwrap();
        let rank1 = TcpGroup::connect(&address, TOKEN, 1, 2, TIMEOUT).unwrap();
        ((rank0.join().unwrap().unwrap(), rank1), strangers)
    });
    assert_eq!((group.0.rank(), group.1.rank()), (0, 1));
    assert!(start.elapsed() < TIMEOUT / 4, "{:?}", start.elapsed());
}

/// What a rank says first, by the protocol: numbers, their digest, the first half of the token.
fn greeting(rank: u64, size: u64, token: &str) -> Vec<u8> {
    let half = &token.as_bytes()[..token.len() / 2];
    let numbers = [0x6361_6e6e_6f72_6d02, rank, size, half.len() as u64];
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|number: &u64| number.to_le_bytes()).collect();
    let digest = bytes
        .iter()
        .fold(0xcbf29ce484222325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100000001b3));
    bytes.extend(digest.to_le_bytes());
    bytes.extend(half);
    bytes
}

/// One that knows the protocol and not the token neither takes a rank's place nor ends the job.
#[test]
fn tcp_nobody_joins_without_the_token() {
    let address = address();
    let wrong = "another token of at least 32 characters";
    let pair = std::thread::scope(|scope| {
        let rank0 = scope.spawn(|| TcpGroup::connect(&address, TOKEN, 0, 2, TIMEOUT));
        for (rank, token) in [(1, wrong), (1, ""), (7, wrong), (1, &TOKEN[..30])] {
            let mut stranger = knock(&address);
            stranger.write_all(&greeting(rank, 2, token)).unwrap();
            // Turned away, without a word.
            assert!(matches!(stranger.read(&mut [0; 64]), Ok(0) | Err(_)), "{token}");
        }
        let error = TcpGroup::connect(&address, wrong, 1, 2, TIMEOUT).unwrap_err().to_string();
        assert!(error.contains("did not welcome rank 1 of 2"), "{error}");
        let rank1 = TcpGroup::connect(&address, TOKEN, 1, 2, TIMEOUT).unwrap();
        (rank0.join().unwrap().unwrap(), rank1)
    });
    let heard = std::thread::scope(|scope| {
        let other = scope.spawn(|| call(&pair.1));
        [call(&pair.0), other.join().unwrap()]
    });
    assert_eq!(heard, ["fine", "fine"]);
}

/// One that listens in rank 0's place is not believed: it cannot show rank 0's half of the token.
#[test]
fn tcp_impostor_of_rank_0_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = vec![0; 56];
            stream.read_exact(&mut heard).unwrap();
            // All it knows: what it was just told.
            let _ = stream.write_all(&heard.repeat(3));
        });
        TcpGroup::connect(&address, TOKEN, 1, 2, Duration::from_secs(2)).unwrap_err().to_string()
    });
    assert!(error.contains("did not welcome") || error.contains("does not know"), "{error}");
}

#[test]
fn tcp_rank_that_joins_twice_fails_all() {
    let (address, timeout) = (address(), Duration::from_secs(4));
    let one = |rank| TcpGroup::connect(&address, TOKEN, rank, 4, timeout).unwrap_err().to_string();
    let heard: Vec<String> = std::thread::scope(|scope| {
        let ranks = [0, 1, 2, 2].map(|rank| scope.spawn(move || one(rank)));
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let told = |error: &String| error.contains("got a call of rank 2 of 4, expected each rank of 4 once");
    // Rank 0, and both that say they are rank 2; rank 1 may have come too late to be told.
    assert!([0, 2, 3].into_iter().all(|i| told(&heard[i])), "{heard:?}");
}

#[test]
fn tcp_rank_that_dies_before_all_have_come_fails_all() {
    let address = address();
    let start = Instant::now();
    let error = std::thread::scope(|scope| {
        let rank0 =
            scope.spawn(|| TcpGroup::connect(&address, TOKEN, 0, 3, TIMEOUT).unwrap_err().to_string());
        let mut rank2 = knock(&address);
        rank2.write_all(&greeting(2, 3, TOKEN)).unwrap();
        drop(rank2);
        rank0.join().unwrap()
    });
    assert!(error.contains("rank 2 left before all had come"), "{error}");
    assert!(start.elapsed() < TIMEOUT / 2);
}

#[test]
fn tcp_missing_ranks_are_named() {
    let short = Duration::from_millis(100);
    let error = TcpGroup::connect(&address(), TOKEN, 0, 2, short).unwrap_err();
    assert!(error.to_string().contains("waited 100ms for rank 1"), "{error}");
    let error = TcpGroup::connect(&address(), TOKEN, 1, 2, short).unwrap_err();
    assert!(error.to_string().contains("waited 100ms for rank 0 at"), "{error}");
    assert!(TcpGroup::connect("127.0.0.1:1", TOKEN, 2, 2, TIMEOUT).is_err());
    let error = TcpGroup::connect("127.0.0.1:1", "short", 1, 2, TIMEOUT).unwrap_err();
    assert!(error.to_string().contains("the token has 5 characters, expected 32 to 1024"), "{error}");
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
        process_for(TEST)
            .envs([
                ("RANK", &*rank.to_string()),
                ("WORLD_SIZE", "3"),
                ("MASTER_ADDR", &host),
                ("MASTER_PORT", &port),
                ("CANDLE_NORM_TOKEN", TOKEN),
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
