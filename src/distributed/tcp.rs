//! A process group over TCP: rank 0 hears every rank, and answers.
//!
//! It needs nothing but the standard library and a port, and takes the environment that launchers set. It
//! is made for small messages: it carries the unique id and the words of calls for NCCL, and serves as an
//! engine for a few processes where MPI is not installed.

use super::bytes::{combine, from_bytes, result_dims, to_bytes};
use super::{check_root, describe, disagreement, error, lock, Kind, ProcessGroup};
use candle_core::{bail, Device, Result, Tensor};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The ranks of a job whose processes reach rank 0 over TCP.
///
/// Rank 0 compares the calls, computes, and answers, so every call costs two messages a rank and all
/// traffic meets at rank 0. A rank whose process ends or that drops its handle fails its peers' calls; one
/// that stays away fails them after the timeout. The connections are neither encrypted nor
/// authenticated: use it within a trusted network.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::distributed::{ProcessGroup, TcpGroup};
/// # fn main() -> candle_core::Result<()> {
/// let file = std::env::temp_dir().join(format!("rendezvous-{}", std::process::id()));
/// let sums = std::thread::scope(|scope| {
///     let rank = |rank| {
///         let group = TcpGroup::from_file(&file, rank, 2)?;
///         group.all_reduce_sum("example", &Tensor::new(&[2f32], &Device::Cpu)?)?.to_vec1::<f32>()
///     };
///     let other = scope.spawn(move || rank(1));
///     [rank(0), other.join().unwrap()]
/// });
/// for sum in sums {
///     assert_eq!(sum?, [4.0]);
/// }
/// # std::fs::remove_file(&file).ok();
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TcpGroup {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    link: Mutex<Link>,
}

#[derive(Debug)]
struct Link {
    /// On rank 0 one for each other rank, in rank order; elsewhere the one to rank 0.
    streams: Vec<TcpStream>,
    broken: Option<String>,
}

/// What opens every connection, so that a stranger on the port is noticed.
const MAGIC: u64 = 0x6361_6e6e_6f72_6d01;

impl TcpGroup {
    /// How long a rank waits for its peers, to connect and in one call, unless told otherwise: 5 minutes.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

    /// The group that the environment describes as `torchrun` does: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`
    /// and `MASTER_PORT`. Under `torchrun` itself, whose own store has that port, the one after it is used.
    ///
    /// # Errors
    /// A variable that is missing or no number, and ranks that do not connect within the timeout.
    pub fn from_env() -> Result<Self> {
        let (rank, world_size) = (env_number("RANK")?, env_number("WORLD_SIZE")?);
        let (host, port) = (env("MASTER_ADDR")?, env_number("MASTER_PORT")?);
        let agent = std::env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|value| value == "True");
        Self::connect(
            &format!("{host}:{}", port + usize::from(agent)),
            rank,
            world_size,
            Self::DEFAULT_TIMEOUT,
        )
    }

    /// The group of `world_size` processes that share a file system: rank 0 writes to `path` where it can
    /// be reached, and the others wait for that. The file must not exist before, and belongs to one job.
    ///
    /// # Errors
    /// A file that cannot be written or already exists, and ranks that do not connect within the timeout.
    pub fn from_file(path: impl AsRef<Path>, rank: usize, world_size: usize) -> Result<Self> {
        let (path, timeout) = (path.as_ref(), Self::DEFAULT_TIMEOUT);
        check_rank(rank, world_size)?;
        if rank > 0 {
            let address = wait_for(timeout, &format!("rank 0's address in {}", path.display()), || {
                // Complete once it ends with a newline.
                let text = std::fs::read_to_string(path).unwrap_or_default();
                text.strip_suffix('\n').map(str::to_string)
            })?;
            return Self::call(&address, rank, world_size, timeout);
        }
        let host = std::env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".to_string());
        let listener = TcpListener::bind((host.as_str(), 0)).map_err(|e| failed("listen on", &host, &e))?;
        let address = listener.local_addr().map_err(|e| failed("listen on", &host, &e))?;
        let written = std::fs::File::create_new(path)
            .and_then(|mut file| file.write_all(format!("{address}\n").as_bytes()));
        written.map_err(|e| failed("write", &path.display().to_string(), &e))?;
        Self::answer(&listener, world_size, timeout)
    }

    /// The group whose rank 0 listens on `address`, a `host:port`.
    ///
    /// # Errors
    /// An address that rank 0 cannot listen on, and ranks that do not connect within the timeout.
    pub fn connect(address: &str, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        check_rank(rank, world_size)?;
        if rank > 0 {
            return Self::call(address, rank, world_size, timeout);
        }
        let listener = TcpListener::bind(address).map_err(|e| failed("listen on", address, &e))?;
        Self::answer(&listener, world_size, timeout)
    }

    /// Rank 0: takes the others' calls.
    fn answer(listener: &TcpListener, world_size: usize, timeout: Duration) -> Result<Self> {
        listener.set_nonblocking(true).map_err(|e| failed("wait on", "a socket", &e))?;
        let mut streams: Vec<Option<TcpStream>> = (1..world_size).map(|_| None).collect();
        while let Some(absent) = streams.iter().position(Option::is_none) {
            let mut stream = wait_for(timeout, &format!("rank {}", absent + 1), || {
                listener.accept().ok().map(|(stream, _)| stream)
            })?;
            prepare(&stream, timeout)?;
            let Ok([magic, rank, size]) = read_numbers(&mut stream) else { continue };
            if magic != MAGIC {
                continue;
            }
            let place = (rank as usize).checked_sub(1).and_then(|i| streams.get_mut(i));
            match place {
                Some(place @ None) if size as usize == world_size => *place = Some(stream),
                _ => bail!(
                    "tcp-group: got a call of rank {rank} of {size}, expected each rank of {world_size} once"
                ),
            }
        }
        Ok(Self::of(0, world_size, timeout, streams.into_iter().flatten().collect()))
    }

    /// The other ranks: call rank 0 until it answers.
    fn call(address: &str, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        let mut stream = wait_for(timeout, &format!("rank 0 at {address}"), || {
            let mut addresses = address.to_socket_addrs().ok()?;
            addresses.find_map(|address| TcpStream::connect_timeout(&address, timeout).ok())
        })?;
        // Rank 0 speaks last, after it has waited for everybody: its explanation should arrive.
        prepare(&stream, timeout * 2)?;
        let hello = [MAGIC, rank as u64, world_size as u64];
        write_numbers(&mut stream, hello).map_err(|e| failed("greet", "rank 0", &e))?;
        Ok(Self::of(rank, world_size, timeout, vec![stream]))
    }

    fn of(rank: usize, world_size: usize, timeout: Duration, streams: Vec<TcpStream>) -> Self {
        Self { rank, world_size, timeout, link: Mutex::new(Link { streams, broken: None }) }
    }

    fn exchange(&self, kind: Kind, what: &str, tensor: &Tensor) -> Result<Tensor> {
        let words = describe(kind, what, tensor);
        let host = tensor.detach().to_device(&Device::Cpu)?.flatten_all()?.contiguous()?;
        let payload = to_bytes(&host)?;
        let mut link = lock(&self.link);
        if let Some(broken) = &link.broken {
            return Err(error(broken.clone()));
        }
        let outcome = if self.rank == 0 {
            self.serve(&mut link.streams, kind, &words, payload, &host)
        } else {
            self.ask(&mut link.streams[0], &words, &payload)
        };
        match outcome {
            Ok(Ok(bytes)) => {
                let dims = result_dims(kind, tensor, self.world_size);
                from_bytes(&bytes, tensor.dtype(), &dims)?.to_device(tensor.device())
            }
            // The ranks disagree, and all know: the group works on.
            Ok(Err(words)) => Err(error(words)),
            Err(words) => {
                link.broken = Some(words.clone());
                // Closed, so that the peers do not wait for this rank.
                link.streams.clear();
                Err(error(words))
            }
        }
    }

    /// Rank 0: hears all, computes, answers all. `Err` where a rank is gone.
    fn serve(
        &self,
        streams: &mut [TcpStream],
        kind: Kind,
        words: &str,
        payload: Vec<u8>,
        host: &Tensor,
    ) -> std::result::Result<Answer, String> {
        let mut brought = vec![(words.to_string(), payload)];
        for (i, stream) in streams.iter_mut().enumerate() {
            let heard = read_block(stream)
                .and_then(|words| Ok((String::from_utf8_lossy(&words).to_string(), read_block(stream)?)));
            match heard {
                Ok(heard) => brought.push(heard),
                Err(e) => {
                    let reason = self.gone(i + 1, words, &e);
                    for stream in streams.iter_mut() {
                        // A peer that cannot be told finds the connection closed.
                        let _ = reply(stream, GONE, reason.as_bytes());
                    }
                    return Err(reason);
                }
            }
        }
        let calls: Vec<&str> = brought.iter().map(|(words, _)| words.as_str()).collect();
        let payloads = brought.iter().map(|(_, payload)| payload.as_slice());
        let answer: Answer = match disagreement(&calls) {
            Some(words) => Err(words),
            None => combine(kind, payloads, host.dtype(), host.elem_count())
                .and_then(|result| to_bytes(&result))
                .map_err(|e| e.to_string()),
        };
        let (status, bytes) = match &answer {
            Ok(bytes) => (FINE, bytes.as_slice()),
            Err(words) => (DISAGREE, words.as_bytes()),
        };
        for (i, stream) in streams.iter_mut().enumerate() {
            reply(stream, status, bytes).map_err(|e| self.gone(i + 1, words, &e))?;
        }
        Ok(answer)
    }

    /// The other ranks: tell rank 0 and take its answer. `Err` where rank 0 is gone.
    fn ask(
        &self,
        stream: &mut TcpStream,
        words: &str,
        payload: &[u8],
    ) -> std::result::Result<Answer, String> {
        let mut talk = || {
            write_block(stream, words.as_bytes())?;
            write_block(stream, payload)?;
            let [status] = read_numbers(stream)?;
            Ok((status, read_block(stream)?))
        };
        let (status, bytes) = talk().map_err(|e| self.gone(0, words, &e))?;
        let text = || String::from_utf8_lossy(&bytes).to_string();
        match status {
            FINE => Ok(Ok(bytes)),
            DISAGREE => Ok(Err(text())),
            _ => Err(text()),
        }
    }

    fn gone(&self, rank: usize, call: &str, error: &std::io::Error) -> String {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("tcp-group: rank {rank} did not join {call} within {:?}", self.timeout)
            }
            _ => format!("tcp-group: rank {rank} left the group while others wait in {call} ({error})"),
        }
    }
}

/// What rank 0 answers: the result, or why there is none.
type Answer = std::result::Result<Vec<u8>, String>;

const FINE: u64 = 0;
const DISAGREE: u64 = 1;
const GONE: u64 = 2;

fn reply(stream: &mut TcpStream, status: u64, bytes: &[u8]) -> std::io::Result<()> {
    write_numbers(stream, [status])?;
    write_block(stream, bytes)
}

fn prepare(stream: &TcpStream, timeout: Duration) -> Result<()> {
    stream
        .set_nonblocking(false)
        // Small messages that wait for each other: never hold one back.
        .and_then(|()| stream.set_nodelay(true))
        .and_then(|()| stream.set_read_timeout(Some(timeout)))
        .and_then(|()| stream.set_write_timeout(Some(timeout)))
        .map_err(|e| failed("set up", "a connection", &e))
}

fn write_numbers<const N: usize>(stream: &mut TcpStream, numbers: [u64; N]) -> std::io::Result<()> {
    numbers.iter().try_for_each(|n| stream.write_all(&n.to_le_bytes()))
}

fn read_numbers<const N: usize>(stream: &mut TcpStream) -> std::io::Result<[u64; N]> {
    let mut numbers = [0; N];
    for n in &mut numbers {
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes)?;
        *n = u64::from_le_bytes(bytes);
    }
    Ok(numbers)
}

fn write_block(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let mut message = (bytes.len() as u64).to_le_bytes().to_vec();
    message.extend(bytes);
    stream.write_all(&message)
}

fn read_block(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let [length] = read_numbers(stream)?;
    let mut bytes = vec![];
    // Grows as bytes arrive: a wrong length from a stranger does not allocate it.
    let read = stream.take(length).read_to_end(&mut bytes)?;
    if read as u64 == length {
        Ok(bytes)
    } else {
        Err(ErrorKind::UnexpectedEof.into())
    }
}

/// Polls until there is something or the time is up.
fn wait_for<T>(timeout: Duration, what: &str, mut poll: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return Ok(found);
        }
        if start.elapsed() > timeout {
            bail!("tcp-group: waited {timeout:?} for {what}")
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn check_rank(rank: usize, world_size: usize) -> Result<()> {
    if rank >= world_size {
        bail!("tcp-group: got rank {rank}, expected one below the world size {world_size}")
    }
    Ok(())
}

fn failed(verb: &str, what: &str, e: &std::io::Error) -> candle_core::Error {
    error(format!("tcp-group: cannot {verb} {what}: {e}"))
}

fn env(name: &str) -> Result<String> {
    std::env::var(name).map_err(|_| error(format!("tcp-group: the environment has no {name}")))
}

/// A number that a launcher put into the environment.
pub(crate) fn env_number(name: &str) -> Result<usize> {
    let value = env(name)?;
    value
        .parse()
        .map_err(|_| error(format!("tcp-group: {name} is {value:?} in the environment, expected a number")))
}

impl ProcessGroup for TcpGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Gather, what, tensor)
    }

    fn all_reduce_sum(&self, what: &str, tensor: &Tensor) -> Result<Tensor> {
        self.exchange(Kind::Sum, what, tensor)
    }

    fn broadcast(&self, what: &str, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(self.world_size, root)?;
        self.exchange(Kind::Broadcast(root), what, tensor)
    }
}
